"""Steps of the default parent: what a budget costs against a model of its own, masks, gates and transformers.

Random weights and tokens in the shapes of params.yaml. A pass is forward and backward of the model and of a loss from
the text; a whole step is teacher, student, distillation, backward, clipping and AdamW.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import NemotronHConfig, NemotronHForCausalLM

from benchmarks.comparison import MB, in_turn, median_ratio, peak_allocated
from benchmarks.report import Row, at_most, measured
from benchmarks.shapes import RandomTokens, Shape, random_model
from elastic_core import ElasticModel, Submodel, extract
from elastic_core.search.choices import Choices
from elastic_core.search.router import Router, noise_generator
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from elastic_core.training.loop import train_step
from elastic_core.training.losses import distillation_loss, resource_loss
from elastic_core.training.run import Run
from elastic_core.training.stage import Loss, Routing, Stage

PARAMS = Path(__file__).resolve().parents[2] / "params.yaml"
ALONE, MASKED, SOFT, TRANSFORMERS = 1.05, 0.55, 1.10, 0.6
ISOLATED, ISOLATED_MEMORY = 1.10, 1.02
MATCHED = 1.10
DOCUMENT = 16  # tokens of a document: several in every row
HALF = Submodel(88, None, 256, 6, 24, 4)  # of the default parent's FLOPs
# Wide enough for matrix products to be most of a pass: where a budget's cost is its FLOPs.
WIDE, HALF_OF_WIDE = Shape("wide", 512, "M-M*-M-", 4096, 256, 4), Submodel(384, None, 1024, 12, 56, 6)
SMALL = Submodel(72, (0, 1, 2, 3, 4, 6, 7), 256, 4, 20, 4)
REPEATS = 25


def rows(quick: bool) -> Iterator[Row]:
    params = yaml.safe_load(PARAMS.read_text())
    config, repeats = parent_config(params), 1 if quick else REPEATS
    stages = {name: params[name] for name in ("train_short", "train_extended")}
    sizes = {name: (2, 24) if quick else (s["batch_size"], s["sequence_length"]) for name, s in stages.items()}
    size = sizes["train_short"]
    yield against_alone(config, "half of the FLOPs", HALF, size, repeats)
    yield against_alone(config, "small", SMALL, size, repeats)
    yield against_masks(config, "default parent", HALF, size, repeats, None)
    wide = Shape("wide", 64, WIDE.pattern, 64, 24, 2, head=16) if quick else WIDE
    half = Submodel(48, None, 128) if quick else HALF_OF_WIDE
    size = wide.sequences, wide.length
    yield against_masks(wide.config(), "wide parent", half, size, min(repeats, 9), None if quick else MASKED)
    yield from gates(config, params, sizes["train_short"], repeats)
    for name, size in sizes.items():
        yield from whole_steps(config, params, name, size, repeats)
    for name, size in sizes.items():
        yield from isolation(config, name, size, repeats)
    for name, size in sizes.items():
        yield state_matching(config, name, size, repeats)


def parent_config(params: dict) -> NemotronHConfig:
    shape = dict(params["parent"]["model"])
    pattern = NemotronHConfig._pattern_to_list(shape.pop("pattern"))
    return NemotronHConfig(
        vocab_size=params["prepare_data"]["vocab_size"], layers_block_type=pattern, conv_kernel=4, **shape
    )


def one_pass(model: ElasticModel, size: tuple[int, int], make_slice: Callable) -> Callable[[], None]:
    """Forward and backward of a loss from the text; `make_slice` gives what to compute with, and a loss to add."""
    ids, labels, _ = RandomTokens(model.config.vocab_size, size[1]).batch(0, size[0])

    def take() -> None:
        sliced, more = make_slice()
        loss = distillation_loss(model.hidden_states(ids, sliced), model.head(sliced), labels, None, 1.0, 0.0)[0]
        (loss + more).backward()
        model.zero_grad(set_to_none=True)

    return take


def flops(take: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        take()
    return counter.get_total_flops()


def compare(check: str, what: str, ways: dict[str, Callable], repeats: int, goal: float | None, note: str = "") -> Row:
    """The first of two ways against the second; no goal in a quick run, whose shapes are mostly overhead."""
    times, (first, second) = in_turn(ways, repeats), ways
    ratio, note = median_ratio(times, first, second), f" ({min(times[first]) * 1e3:.0f} ms{note})"
    if goal is None or repeats == 1:
        return measured(check, what, f"{ratio:.2f} ×{note}")
    return at_most(check, what, ratio, goal, note)


def against_alone(config: NemotronHConfig, name: str, submodel: Submodel, size: tuple[int, int], repeats: int) -> Row:
    """A slice against a model of its own."""
    model, submodel = random_model(config, 0), submodel.resolve(config)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(f"{directory}/parent")
        extract(f"{directory}/parent", submodel, f"{directory}/alone")
        alone = ElasticModel.from_pretrained(f"{directory}/alone")
    slices = model.slice(submodel), alone.slice()
    ways = {
        "slice": one_pass(model, size, lambda: (slices[0], 0.0)),
        "alone": one_pass(alone, size, lambda: (slices[1], 0.0)),
    }
    return compare("hard pass against its own model", f"{name}, {tokens(size)}", ways, repeats, ALONE)


def against_masks(
    config: NemotronHConfig, name: str, submodel: Submodel, size: tuple[int, int], repeats: int, goal: float | None
) -> Row:
    """A slice against the whole model with everything else masked."""
    model, submodel = random_model(config, 0), submodel.resolve(config)
    slices = model.slice(submodel), model.slice(gates=one_hot_gates(model, submodel))
    ways = {
        "slice": one_pass(model, size, lambda: (slices[0], 0.0)),
        "masked": one_pass(model, size, lambda: (slices[1], 0.0)),
    }
    note = f", {flops(ways['slice']) / flops(ways['masked']):.2f} of the FLOPs"
    return compare("hard pass against masks", f"{name}, {tokens(size)}", ways, repeats, goal, note)


def one_hot_gates(model: ElasticModel, submodel: Submodel) -> dict[str, torch.Tensor]:
    """Masks of a submodel at full size, without a gradient: the least that masking costs."""
    sizes, config = submodel.sizes(model.config), model.config
    gates = {"depth": torch.zeros(len(config.layers_block_type))}
    gates["depth"][list(submodel.kept_layers)] = 1
    for dims in model.layout.values():
        for unit in (leaf for dim in dims for leaf in dim.leaves()):
            gates[unit.key] = torch.zeros(unit.size)
            gates[unit.key][unit.prefix(sizes[unit.key])] = 1
    return gates


def gates(config: NemotronHConfig, params: dict, size: tuple[int, int], repeats: int) -> Iterator[Row]:
    """The router's soft mode, its own gradient included, against the plain full model."""
    model, router = random_model(config, 0), make_router(config, params)

    def soft():
        probs = router.probs(1, 1.0, 1.0, noise_generator(0, 0, 0))
        target = router.targets[1] * sum(p.numel() for p in model.parameters())
        return model.slice(gates=router.space.soft_gates(probs)), resource_loss(router.space.cost(probs), target)

    sliced = model.slice()
    ways = {"soft": one_pass(model, size, soft), "plain": one_pass(model, size, lambda: (sliced, 0.0))}
    yield compare("soft pass against the plain full one", tokens(size), ways, repeats, SOFT)


def make_router(config: NemotronHConfig, params: dict) -> Router:
    torch.manual_seed(0)
    choices = {name: tuple(sizes) for name, sizes in params["choices"].items()}
    space = ElasticSpace(config, Choices(**choices), tuple(range(len(config.layers_block_type))))
    return Router(space, tuple(params["budgets"].values()))


def whole_steps(config: NemotronHConfig, params: dict, name: str, size: tuple[int, int], repeats: int) -> Iterator[Row]:
    """A step of training against the same with transformers' model, at its own chunk size and at one that suits it."""
    data = RandomTokens(config.vocab_size, size[1])
    run = make_run(config, data, size)
    ways = {"ours": functools.partial(train_step, run), "theirs": transformers_step(config, data, size)}
    yield compare("whole step against transformers", f"{name}, {tokens(size)}", ways, repeats, TRANSFORMERS)
    config = NemotronHConfig(**{**config.to_dict(), "chunk_size": 32})
    times = in_turn({**ways, "theirs": transformers_step(config, data, size)}, repeats)
    what = f"{name}, {tokens(size)}, their chunk_size 32"
    yield measured("whole step against transformers", what, f"{median_ratio(times, 'ours', 'theirs'):.2f} ×")


def make_run(config: NemotronHConfig, data: RandomTokens, size: tuple[int, int], state_weight: float = 0.0) -> Run:
    stage = Stage(
        size[1], size[0], steps=10**6, learning_rate=1e-3, mixture={"random": 1.0},
        loss=Loss(0.0, 1.0, state_weight=state_weight), budget_shares={"full": 1.0},
    )  # fmt: skip
    model, teacher = random_model(config, 0), random_model(config, 1)
    members = {"full": Member(1.0, model.full)}
    return Run(model, stage, data, {"full": 1.0}, members, None, Routing(), teacher)


def isolation(config: NemotronHConfig, name: str, size: tuple[int, int], repeats: int) -> Iterator[Row]:
    """A step of rows of documents that do not see each other, against the same step of rows without documents."""
    check, what = "documents against none", f"{name}, {tokens(size)}, documents of {DOCUMENT}"
    data = {
        way: RandomTokens(config.vocab_size, size[1], long) for way, long in (("documents", DOCUMENT), ("none", None))
    }
    runs = {way: make_run(config, rows, size) for way, rows in data.items()}
    ways = {way: functools.partial(train_step, run) for way, run in runs.items()}
    yield compare(f"{check}, time", what, ways, repeats, ISOLATED)
    peaks = {way: peak_allocated(take) for way, take in ways.items()}
    note = f" ({peaks['documents'] / MB:.1f} MB)"
    yield at_most(f"{check}, memory", what, peaks["documents"] / peaks["none"], ISOLATED_MEMORY, note)


def state_matching(config: NemotronHConfig, name: str, size: tuple[int, int], repeats: int) -> Row:
    """A step whose loss matches the teacher's states after every layer, against the same step without."""
    data = RandomTokens(config.vocab_size, size[1])
    weights = {"matched": 1.0, "not": 0.0}
    ways = {way: functools.partial(train_step, make_run(config, data, size, w)) for way, w in weights.items()}
    return compare("states matched against not", f"{name}, {tokens(size)}", ways, repeats, MATCHED)


def transformers_step(config: NemotronHConfig, data: RandomTokens, size: tuple[int, int]) -> Callable[[], None]:
    """The same step as one writes it with transformers and torch alone."""
    student, teacher = (NemotronHForCausalLM(config) for _ in range(2))
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.train().parameters(), lr=1e-3, fused=True)

    def take() -> None:
        ids = data.batch(0, size[0]).input_ids
        with torch.no_grad():
            target = teacher(ids, use_cache=False).logits.log_softmax(-1)
        logprobs = student(ids, use_cache=False).logits.log_softmax(-1)
        F.kl_div(logprobs.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take


def tokens(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]} tokens"
