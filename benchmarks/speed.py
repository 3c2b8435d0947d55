"""How long steps take, on the full model and on a slice of it, and what they hold at most."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.report import FAIL, PASS, Row, measured, not_measured
from benchmarks.shapes import RandomTokens, Shape, random_model, scan_inputs
from elastic_core import Submodel
from elastic_core.cost.metrics import num_parameters
from elastic_core.model.architectures.nemotron_h import layers_of
from elastic_core.model.ops import kernels
from elastic_core.model.ops.ssd import ssd
from elastic_core.search.selection import Member
from elastic_core.training.distributed import placement
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.loop import train_step
from elastic_core.training.run import Run
from elastic_core.training.stage import Loss, Stage

WARM_UP, REPEATS = 2, 9
LONG = Shape("1.2 B", 2048, "M-M-M*-M-M-M*-M-M-M*-M-M-", 65536, 49152, 1, groups=8)
BUSY = 0.45  # goal: share of the peak, by the operations that a step has to do
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12}  # dense bfloat16
BYTES_PER_PARAMETER = 16  # float32 weight, gradient and two moments


def measure(ranks: Ranks, shapes: tuple[Shape, ...]) -> Iterator[Row]:
    """All times: steps of every shape, eager and compiled, and the scan at several chunk lengths."""
    is_gpu = ranks.device.type == "cuda"
    for shape in shapes:
        needed = BYTES_PER_PARAMETER * num_parameters(shape.config())
        if is_gpu and needed > 0.6 * torch.cuda.get_device_properties(ranks.device).total_memory:
            yield not_measured("step", shape.name, f"needs {needed / 1e9:.0f} GB for its state alone")
            continue
        is_large = is_gpu and shape is shapes[-1]  # smaller ones may be bound by launching kernels
        yield from step_rows(ranks, shape, Execution(activation_checkpointing=True), is_large)
        compiled = Execution(activation_checkpointing=True, compile=True)
        if is_gpu:
            yield from step_rows(ranks, shape, compiled, is_large)
        else:
            yield not_measured("step, compiled", shape.name, "on GPUs only")
    if not is_gpu:
        yield not_measured("scan", "forward and backward", "on GPUs only")
        yield not_measured("step", f"{LONG.name}, {LONG.length:,} tokens of context", "on GPUs only")
        return
    yield from step_rows(ranks, LONG, Execution(activation_checkpointing=True), False)
    for chunk in (32, 64, 128, 256):
        yield scan_row(ranks.device, chunk)
    yield kernel_row(ranks.device)


def half_of(config) -> Submodel:
    """About half of the parameters: three quarters of every width, half of the FFN."""

    def most(size: int, groups: int) -> int:
        return 3 * size // 4 // groups * groups

    return Submodel(
        hidden_size=most(config.hidden_size, 1),
        intermediate_size=config.intermediate_size // 2,
        mamba_num_heads=most(config.mamba_num_heads, config.n_groups),
        num_attention_heads=most(config.num_attention_heads, config.num_key_value_heads),
    ).resolve(config)


def step_rows(ranks: Ranks, shape: Shape, execution: Execution, is_large: bool) -> Iterator[Row]:
    """Steps from text alone, without a teacher: of the full model and of half of it in turn, in bfloat16."""
    release()
    config = shape.config()
    budgets = {"full": Submodel().resolve(config), "half": half_of(config)}
    shares = {name: num_parameters(config, s) / num_parameters(config) for name, s in budgets.items()}
    stage = Stage(
        shape.length, shape.sequences, steps=1000, learning_rate=1e-4, mixture={"random": 1.0}, loss=Loss(1.0, 0.0),
        precision="bfloat16",
    )  # fmt: skip
    chosen = {name: Member(shares[name], submodel) for name, submodel in budgets.items()}
    model = placement.place(random_model(config, 0), ranks, execution, "bfloat16")
    run = Run(model, stage, RandomTokens(config.vocab_size, shape.length), shares, chosen, ranks=ranks)

    def step(budget: str) -> Callable[[], object]:
        def take() -> None:
            run.stage = replace(stage, budget_shares={budget: 1.0})
            train_step(run)

        return take

    kind = "step, compiled" if execution.compile else "step"
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    try:
        times, memory = interleaved({name: step(name) for name in budgets}, ranks.device)
    except torch.cuda.OutOfMemoryError:
        yield not_measured(kind, shape.name, "out of memory")
        return
    for name in budgets:
        rate = shape.length * shape.sequences / times[name]
        held = f", at most {memory[name] / 1e9:.1f} GB" if memory[name] else ""
        what = f"{shape.name}, {name} ({shares[name]:.2f} of the parameters)"
        used = model_flops(config, budgets[name], shape.length) * rate
        share = f", {used / 1e12:.0f} TFLOP/s" + (f" ({used / PEAK[device]:.0%} of its peak)" if device in PEAK else "")
        yield measured(kind, what, f"{times[name] * 1e3:.1f} ms, {rate:,.0f} tokens/s{share}{held}")
        if is_large and name == "full" and device in PEAK:
            busy, context = used / PEAK[device], f"{shape.name}, context of {shape.length:,}"
            yield Row(f"{kind}, utilisation", context, f"{busy:.1%}", f"≥ {BUSY:.0%}", PASS if busy >= BUSY else FAIL)
    ratio, what = times["half"] / times["full"], f"{shape.name}, half / full"
    if is_large:
        yield Row(kind, what, f"{ratio:.2f}", "< 1", PASS if ratio < 1 else FAIL)
    else:
        yield measured(kind, what, f"{ratio:.2f}")


def model_flops(config, submodel: Submodel, length: int) -> float:
    """Floating-point operations of a training step per token, as MFU counts them: without recomputation.

    Six per weight that is multiplied (all but the embeddings'), and those of attention's scores.
    """
    weights = num_parameters(config, submodel) - config.vocab_size * submodel.hidden_size
    attention = sum(i in submodel.kept_layers for i in layers_of(config, "*"))
    heads = (
        submodel.num_attention_heads if isinstance(submodel.num_attention_heads, int) else config.num_attention_heads
    )
    return 6 * weights + 6 * attention * heads * config.head_dim * length  # half of the scores are masked


def release() -> None:
    """Let go of what an earlier measurement held: sharded models are in cycles of references."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def interleaved(steps: dict[str, Callable[[], object]], device: torch.device) -> tuple[dict, dict]:
    """Median seconds and peak bytes (None on a CPU) of several things done in turn, so that drifts hit all alike."""
    times, memory = {name: [] for name in steps}, dict.fromkeys(steps)
    is_gpu = device.type == "cuda"
    for repeat in range(WARM_UP + REPEATS):
        for name, take in steps.items():
            if is_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            take()
            if is_gpu:
                torch.cuda.synchronize(device)
                memory[name] = torch.cuda.max_memory_allocated(device)
            if repeat >= WARM_UP:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}, memory


def scan_row(device: torch.device, chunk: int) -> Row:
    """The scan of one layer of Nemotron-Nano-12B-v2, forward and backward, over one sequence of 8,192 tokens."""
    release()
    inputs = scan_inputs(device, 8192, heads=128, channels=80, groups=8, states=128)
    inputs = tuple(value.requires_grad_() for value in inputs)

    def both() -> None:
        torch.autograd.grad(ssd(*inputs, chunk=chunk).sum(), inputs)

    times, memory = interleaved({"scan": both}, device)
    result = f"{times['scan'] * 1e3:.1f} ms, at most {memory['scan'] / 1e9:.1f} GB"
    return measured("scan", f"12B's layer, 8,192 tokens, forward and backward, chunk {chunk}", result)


def kernel_row(device: torch.device) -> Row:
    """The same by what training in bfloat16 takes."""
    release()
    what = "12B's layer, 8,192 tokens, forward and backward, Triton"
    if reason := kernels.missing().get("scan"):
        return not_measured("scan", what, reason)
    x, dt, A, B, C, D = scan_inputs(device, 8192, heads=128, channels=80, groups=8, states=128)
    inputs = tuple(value.requires_grad_() for value in (x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), D))

    def both() -> None:
        torch.autograd.grad(kernels.scan(*inputs, torch.bfloat16).sum(), inputs)

    times, memory = interleaved({"scan": both}, device)
    return measured("scan", what, f"{times['scan'] * 1e3:.1f} ms, at most {memory['scan'] / 1e9:.1f} GB")
