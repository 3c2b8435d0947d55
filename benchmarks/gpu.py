"""Does training hold on this device, and how fast is it? `python -m benchmarks.gpu`, on any machine with one CUDA GPU.

Needs torch, transformers, numpy and safetensors only. A process group of one rank (NCCL) goes through all of FSDP's
mechanics. `--device cpu --small` checks the same on a CPU (gloo) in less than a minute. Prints one table, writes
benchmarks/results/<device>.json, and exits with 1 where a check failed.
"""

import argparse
import functools
import math
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import NemotronHConfig

from benchmarks import kernels, speed
from benchmarks.kernels import deviation
from benchmarks.report import FAIL, Row, holds, not_measured, table, within, write
from benchmarks.shapes import RandomTokens, Shape, random_model
from elastic_core import Submodel
from elastic_core.model.architectures.nemotron_h import layers_of
from elastic_core.model.ops import kernels as fast_kernels
from elastic_core.search.choices import Choices
from elastic_core.search.router import Router
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from elastic_core.training.checkpoint import Checkpoints
from elastic_core.training.distributed import model_files
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.gradients import average_gradients, whole
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.loop import accumulate_gradients, router_backward, train_step
from elastic_core.training.run import Run, named_parameters, resume, save, state_tensors, trained_modules
from elastic_core.training.stage import Loss, Routing, Stage

# Gradients, as the largest deviation over each tensor's largest entry. float32: sums in another order. bfloat16: three
# digits per product, and sums of gradients rounded at another place than autocast does.
FLOAT32, BFLOAT16 = 1e-4, 5e-2
PLAIN = Execution()
BUDGETS = {"full": 1.0, "heterogeneous": 0.7, "small": 0.4}


TINY = Shape("tiny", 64, "M-*M-", 256, 33, 2, head=16)  # an odd length
CHECKED = Shape("checked", 512, "M-*M-M-*", 4096, 257, 2)
TIMED = (
    Shape("0.2 B", 1024, "M-M-M*-M-M-M*-", 32768, 2048, 8, groups=8),
    Shape("1.2 B", 2048, "M-M-M*-M-M-M*-M-M-M*-M-M-", 65536, 8192, 2, groups=8),
    Shape("2.0 B", 3072, "M-M-M*-M-M-M*-M-M-M*-M-M-", 65536, 8192, 1, groups=8),
)


@dataclass(frozen=True)
class Setting:
    """This device, alone and as the only rank of a group."""

    alone: Ranks
    ranks: Ranks
    shape: Shape
    directory: Path

    @property
    def device(self) -> torch.device:
        return self.ranks.device


def members(config: NemotronHConfig) -> dict[str, Member]:
    """The whole model; one whose widths differ by layer and that lacks one; a small one that lacks another too."""
    num_layers, full = len(config.layers_block_type), config.intermediate_size
    ffn = tuple(full // 2 if i % 2 else 3 * full // 4 for i in range(len(layers_of(config, "-"))))
    hidden = 3 * config.hidden_size // 4
    submodels = {
        "full": Submodel(),
        "heterogeneous": Submodel(hidden, tuple(range(num_layers - 1)), ffn, config.mamba_num_heads // 2),
        "small": Submodel(
            config.hidden_size // 2, tuple(range(1, num_layers - 1)), full // 2, config.mamba_num_heads // 2,
            config.mamba_head_dim // 2, config.num_attention_heads // 2,
        ),
    }  # fmt: skip
    return {name: Member(BUDGETS[name], submodel.resolve(config)) for name, submodel in submodels.items()}


def start(setting: Setting, ranks: Ranks, execution: Execution, precision: str, soft: bool = False) -> Run:
    """A run of the checked shape that distils a teacher, from the same weights every time."""
    load = functools.partial(model_files.from_pretrained, ranks=ranks, execution=execution, precision=precision)
    model, teacher = load(setting.directory / "model"), load(setting.directory / "teacher", frozen=True)
    router = None
    if soft:
        config = model.config
        choices = Choices((config.hidden_size, config.hidden_size // 2), (config.intermediate_size, 64),
                          depth=(len(config.layers_block_type), 3))  # fmt: skip
        torch.manual_seed(0)
        space = ElasticSpace(config, choices, tuple(range(len(config.layers_block_type))))
        router = Router(space, tuple(BUDGETS.values()))
    data = RandomTokens(model.config.vocab_size, setting.shape.length)
    stage = Stage(
        setting.shape.length, 3 * setting.shape.sequences, steps=100, learning_rate=1e-3, mixture={"random": 1.0},
        microbatches=3, loss=Loss(0.5, 1.0), precision=precision,
    )  # fmt: skip
    chosen = None if soft else members(model.config)
    return Run(model, stage, data, BUDGETS, chosen, router, Routing(), teacher, ranks=ranks)


def gradients(setting: Setting, ranks: Ranks, execution=PLAIN, precision="float32", soft=False, dealt=None):
    """Every gradient of a step's microbatches, whole and in CPU memory, and their losses."""
    run = start(setting, ranks, execution, precision, soft)
    results = accumulate_gradients(run, dealt or list(BUDGETS))
    gates = [result["gates"] for result in results if result["gates"] is not None]
    router_backward(run, results, [of_microbatch.leaf.grad.cpu() for of_microbatch in gates])
    average_gradients(trained_modules(run).values(), ranks)
    found = {name: whole(p.grad).cpu() for name, p in named_parameters(run) if p.grad is not None}
    return found | {f"loss {i}": result["loss"].cpu() for i, result in enumerate(results)}


def check_sharding(setting: Setting) -> Iterator[Row]:
    """One rank's shards against the same model without a process group."""
    for precision, bound in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
        for what, values in {
            "hard: full, per-layer widths, skipped layers": {},
            "hard: layers that nobody ran": {"dealt": ["small"] * 3},
            "soft: router's gates": {"soft": True},
        }.items():
            expected = gradients(setting, setting.alone, precision=precision, **values)
            found = gradients(setting, setting.ranks, precision=precision, **values)
            yield within(f"sharded = whole, {precision}", what, deviation(found, expected), bound)


def check_execution(setting: Setting) -> Iterator[Row]:
    """What must change nothing: recomputation, shards in CPU memory, compiled blocks."""
    for precision, bound in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
        expected = gradients(setting, setting.ranks, precision=precision)
        for name in ("activation_checkpointing", "offload_teacher", "offload_student", "compile"):
            what = f"{name}, {precision}"
            if name == "compile" and setting.device.type == "cpu":
                yield not_measured("execution = plain", what, "on GPUs only")
                continue
            found = gradients(setting, setting.ranks, Execution(**{name: True}), precision)
            yield within("execution = plain", what, deviation(found, expected), bound)


def check_resume(setting: Setting) -> Iterator[Row]:
    """A checkpoint read by a new run: the same state, and after one more step the same weights, to the bit."""
    first = start(setting, setting.ranks, PLAIN, "bfloat16")
    checkpoints = Checkpoints(setting.directory / "checkpoints", 1, setting.ranks)
    train_step(first)
    train_step(first)
    save(first, checkpoints)
    checkpoints.wait()
    second = start(setting, setting.ranks, PLAIN, "bfloat16")
    resume(second, checkpoints)
    yield holds("resume", "weights and moments as saved", equal_states(first, second))
    train_step(first)
    train_step(second)
    yield holds("resume", "weights and moments after the next step", equal_states(first, second))


def equal_states(one: Run, two: Run) -> bool:
    states = [{name: whole(value) for name, value in state_tensors(run).items()} for run in (one, two)]
    return one.step == two.step and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def check_operations(setting: Setting) -> Iterator[Row]:
    yield from kernels.measure(setting.device, FLOAT32)
    yield from kernels.shared_rows(setting.device, FLOAT32)


CHECKS = (check_sharding, check_execution, check_resume, check_operations)


def environment(device: torch.device) -> dict:
    """What the numbers depend on."""
    is_gpu = device.type == "cuda"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if not is_gpu:
        return {"device": f"cpu {platform.machine()}", "threads": torch.get_num_threads(), **versions}
    memory = torch.cuda.get_device_properties(device).total_memory
    return {"device": torch.cuda.get_device_name(device), "memory_bytes": memory, **versions}


def run(device: str, small: bool, minutes: float = math.inf) -> tuple[dict, list[Row]]:
    """All rows on a device, in a process group of one rank. After so many minutes, nothing more is begun."""
    deadline = time.monotonic() + 60 * minutes
    is_gpu = device == "cuda"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # bit-equal steps; read when CUDA starts
    if is_gpu:
        torch.cuda.set_device(0)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # on a free port
    dist.init_process_group("nccl" if is_gpu else "gloo", store=store, rank=0, world_size=1)
    ranks, shape, rows = Ranks.current(use_gpu=is_gpu), TINY if small else CHECKED, []
    try:
        with tempfile.TemporaryDirectory() as directory:
            setting = Setting(Ranks(device=ranks.device), ranks, shape, Path(directory))
            for seed, name in enumerate(("model", "teacher")):
                random_model(shape.config(), seed).save_pretrained(setting.directory / name)
            start_deterministic(ranks.device)
            for check in CHECKS:
                rows += show(check(setting), deadline)
            torch.use_deterministic_algorithms(False)
        rows += show(speed.measure(ranks, (TINY,) if small else TIMED), deadline)
        return environment(ranks.device), rows
    finally:
        dist.destroy_process_group()


def start_deterministic(device: torch.device) -> None:
    """Switch deterministic algorithms on, for the checks. Kernels are imported before.

    mamba_ssm would otherwise leave its autotuner one configuration for the whole process, and the speeds that are
    measured later would be those of untuned kernels.
    """
    if device.type == "cuda":
        fast_kernels.missing()
    torch.use_deterministic_algorithms(True, warn_only=True)


def show(rows: Iterator[Row], deadline: float = math.inf) -> Iterator[Row]:
    """Say on stderr that work goes on. Nothing is begun after the `deadline`, of time.monotonic()."""
    for row in rows:
        print(f"{row.check}: {row.what}: {row.result} ({row.status})", file=sys.stderr, flush=True)
        yield row
        if time.monotonic() > deadline:
            yield not_measured(row.check, "what would come next", "the time is over (--minutes)")
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, a minute on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="after these, no further row is begun")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where the JSON goes")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device here; `--device cpu --small` checks the mechanics without one")
    warnings.filterwarnings("ignore", message=".*deterministic")
    about, rows = run(arguments.device, arguments.small, arguments.minutes)
    print(f"{about}\n\n{table(rows)}")
    name = re.sub(r"\W+", "-", about["device"]) + ("-small" if arguments.small else "")
    write(arguments.out / f"{name}.json", about, rows)
    sys.exit(any(row.status == FAIL for row in rows))


if __name__ == "__main__":
    main()
