"""All budgets from one set of weights (elastic_core/export/nested.py), against the full model and extracted ones."""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.comparison import in_turn, median_ratio
from benchmarks.report import Row, at_most, holds, measured
from benchmarks.shapes import Shape, random_model
from elastic_core import Submodel, extract
from elastic_core.cost.metrics import num_parameters
from elastic_core.export import elastic_checkpoint
from elastic_core.export.nested import NestedModel
from elastic_core.search.selection import Member

SHAPE = Shape("60 M", 512, "M-M*-M-M*-M-", 16384, 64, 1, groups=4)
QUICK = Shape("tiny", 64, "M-*M-", 256, 16, 1, head=16)
PROMPT, NEW, REPEATS = 32, 24, 9


def rows(quick: bool) -> Iterator[Row]:
    shape = QUICK if quick else SHAPE
    with tempfile.TemporaryDirectory() as temporary:
        directory, alone = Path(temporary), {}
        for name in write_family(directory / "elastic", shape):
            extract(directory / "elastic", name, directory / name)
            alone[name] = AutoModelForCausalLM.from_pretrained(directory / name).eval()
        nested = NestedModel.from_pretrained(directory / "elastic")
        yield from _same_tokens(nested, alone, shape)
        what = f"memory of all budgets / one full model, {shape.name}"
        yield bounded(quick, what, _memory(nested, alone), 1.02)
        yield from _speed(nested, alone, shape, quick)


def write_family(directory: Path, shape: Shape) -> dict[str, Submodel]:
    """A random family with three budgets: their names and submodels."""
    config = shape.config()
    random_model(config, 0).save_pretrained(directory)
    budgets = {"full": Submodel().resolve(config), "0.6": _part(config, 0.75), "0.3": _part(config, 0.5)}
    members = {n: Member(num_parameters(config, s) / num_parameters(config), s) for n, s in budgets.items()}
    elastic_checkpoint.write(directory, config, members, [])
    return budgets


def bounded(quick: bool, what: str, ratio: float, bound: float, note: str = "") -> Row:
    """The small shapes of a quick run have no goal: they are mostly overhead."""
    if quick:
        return measured("serving", what, f"{ratio:.2f} ×{note}")
    return at_most("serving", what, ratio, bound, note)


def _part(config, share: float) -> Submodel:
    """`share` of every width, and a layer less than all."""

    def most(size: int, groups: int = 1) -> int:
        return max(groups, int(share * size) // groups * groups)

    return Submodel(
        hidden_size=most(config.hidden_size),
        intermediate_size=most(config.intermediate_size),
        mamba_num_heads=most(config.mamba_num_heads, config.n_groups),
        mamba_head_dim=most(config.mamba_head_dim),
        num_attention_heads=max(
            config.num_key_value_heads, most(config.num_attention_heads, config.num_key_value_heads)
        ),
        kept_layers=tuple(range(len(config.layers_block_type) - 1)),
    ).resolve(config)


def _prompt(shape: Shape) -> torch.Tensor:
    return torch.randint(0, shape.config().vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def _same_tokens(nested: NestedModel, alone: dict, shape: Shape) -> Iterator[Row]:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for name, model in alone.items():
        same = torch.equal(nested.generate(_prompt(shape), name, **options), model.generate(_prompt(shape), **options))
        yield holds("serving", f"{NEW} greedy tokens with cache at budget {name} / the extracted model's", same)


def _memory(nested: NestedModel, alone: dict) -> float:
    """Bytes of every different storage that some budget's model holds, over those of the full model alone."""
    storages = {}
    for name in alone:
        model = nested.at(name)
        orders = [order for module in model.modules() for order in vars(module).values() if torch.is_tensor(order)]
        for tensor in [*model.parameters(), *model.buffers(), *orders, *nested.weights.values()]:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values()) / sum(p.numel() * p.element_size() for p in alone["full"].parameters())


class _Decoder:
    """Takes one greedy token at a time from a model that has read the prompt."""

    @torch.no_grad()
    def __init__(self, model, prompt: torch.Tensor):
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.token = self._read(prompt)

    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, past_key_values=self.cache, use_cache=True).logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def __call__(self) -> None:
        self.token = self._read(self.token)


def _speed(nested: NestedModel, alone: dict, shape: Shape, quick: bool) -> Iterator[Row]:
    """A token at each budget, nested and alone, and tokens of all budgets in turn against the same one by one."""
    prompt = _prompt(shape)
    decoders = {f"nested {name}": _Decoder(nested.at(name), prompt) for name in alone}
    decoders |= {f"alone {name}": _Decoder(model, prompt) for name, model in alone.items()}
    turns = [decoders[f"nested {name}"] for name in alone]

    def repeated(decoder: _Decoder):
        return lambda: [decoder() for _ in range(NEW)]

    def switched() -> None:
        for _ in range(NEW):
            for decoder in turns:
                decoder()

    steps = {name: repeated(decoder) for name, decoder in decoders.items()}
    times = in_turn({**steps, "switched": switched}, 1 if quick else REPEATS)
    for name in alone:
        ratio = median_ratio(times, f"nested {name}", f"alone {name}")
        note = f" ({1e3 * statistics.median(times[f'nested {name}']) / NEW:.1f} ms)"
        yield bounded(quick, f"a token at budget {name}, nested / extracted model", ratio, 1.05, note)
    times["apart"] = [sum(round_) for round_ in zip(*(times[f"nested {name}"] for name in alone), strict=True)]
    ratio = median_ratio(times, "switched", "apart")
    yield bounded(quick, "budgets switched at every token / one after the other", ratio, 1.05)
