"""`elastic adopt`: makes a nested checkpoint that another program has trained an elastic checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elastic_core.config import load
from elastic_core.data.tokenizer import load_tokenizer
from elastic_core.errors import UserError, named
from elastic_core.export import adoption, elastic_checkpoint
from elastic_core.io.atomic import check_apart, check_out
from elastic_core.model import hf
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.submodel import Submodel
from tasks.settings.local_checks import why_not_writable
from tasks.settings.merging import ROOT
from tasks.settings.yaml_files import read_mapping

TEXT = ROOT / "docs/method.md"  # the text for losses, where none is named
ROW = 512  # tokens of a row
CLEARLY = 0.01  # nats per token by which one head order has to be better than another
FORMS = "group, or shard:N with the number of tensor-parallel shards, such as shard:8"


@dataclass(frozen=True)
class Adopted:
    """What `adopt` has found and written. Losses in nats per token; `by_order`: mean loss of members by head order."""

    out: Path
    members: dict[str, Submodel]
    loss: float  # of the whole model
    losses: dict[str, float]
    head_order: str
    by_order: dict[str, float]
    tokens: int


def adopt(
    directory: Path,
    sizes: Path,
    head_order: str | None = None,
    out: Path | None = None,
    text: Path | None = None,
    tokens: int = 2048,
    most_excess: float = 1.0,
    force: bool = False,
) -> Adopted:
    """Check the members in the file `sizes` against the model `directory`, and write its elastic.json.

    sizes: YAML or JSON, the name of every member with the fields of `Submodel`; an empty entry is the whole model.
    head_order: "group" or "shard:N". None takes the one with the lowest losses, and "group" where losses hardly differ.
    out: the elastic checkpoint is a copy there. Heads have to be sorted for some orders, which needs a copy.
    text, tokens: the losses are measured on the first `tokens` tokens of this file.
    most_excess: how much larger a member's loss may be than that of the whole model, in nats per token.
    force: write in spite of losses, over an elastic.json that is there, and in place of a model that is at `out`.

    Raises UserError for what the caller has to change. Nothing is written then.
    """
    if out is not None:
        check_apart(out, [directory, sizes, TEXT if text is None else text])
        check_out(out, force)
        if (reason := why_not_writable(out.parent)) is not None:
            raise UserError(f"--out: got {out}; allowed: a directory that can be written; {reason}")
    elif (directory / elastic_checkpoint.FILE).exists() and not force:
        raise UserError(f"{directory}: has an {elastic_checkpoint.FILE} already; replace it with --force")
    config = hf.read_config(directory)
    members = read_members(sizes, config)
    orders = _orders(config, members, head_order)
    ids = read_ids(directory, TEXT if text is None else text, tokens)
    model = ElasticModel.from_pretrained(directory, dtype=_dtype(directory))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = ids.to(next(model.parameters()).device)
    whole = adoption.losses(model, {"": model.full}, ids, adoption.BY_GROUP)[""]
    found = {order: adoption.losses(model, members, ids, order) for order in orders}
    del model  # its memory is not needed for writing
    means = {order: sum(values.values()) / len(values) for order, values in found.items()}
    order = orders[0]  # the given one, or BY_GROUP
    if head_order is None and min(means.values()) < means[order] - CLEARLY:
        order = min(means, key=means.get)
    if not force:
        _check_order(order, means, head_order is not None)
        _check_losses(whole, found[order], most_excess, config.vocab_size)
    _check_expressible(config, members, order)
    if adoption.sorted_orders(config, members, order) or out is not None:
        if out is None:
            raise UserError(
                f"--head-order {spelling(order)}: the heads have to be sorted, so the weights are written again; name "
                "a directory for them with --out"
            )
        adoption.write_sorted(directory, out, config, members, order)
    else:
        adoption.write(directory, config, members)
    by_order = {spelling(key): mean for key, mean in means.items()}
    return Adopted(
        directory if out is None else out, members, whole, found[order], spelling(order), by_order, ids.numel()
    )


def read_members(file: Path, config) -> dict[str, Submodel]:
    """The members in a file, resolved and largest first. Raises UserError with the file's name."""
    values = read_mapping(file, str(file))
    with named(file):
        members = {
            str(name): load(Submodel, {} if entry is None else entry, str(name)) for name, entry in values.items()
        }
        return adoption.check_members(config, members)


def spelling(order: int) -> str:
    """How users write a head order."""
    return "group" if order == adoption.BY_GROUP else f"shard:{order}"


def read_order(text: str) -> int:
    """The head order of a user's text. Raises UserError for another text."""
    kind, _, number = text.partition(":")
    if text == "group":
        return adoption.BY_GROUP
    if kind == "shard" and number.isdecimal() and int(number) >= 1:
        return int(number)
    raise UserError(f"--head-order: got {text!r}; allowed: {FORMS}")


def _orders(config, members, head_order: str | None) -> list[int]:
    """The head orders to measure: the one that is given comes first, then all that differ from it."""
    if head_order is None:
        return adoption.possible_orders(config, members)
    given = read_order(head_order)
    for name, member in members.items():
        sizes = member.sizes(config)
        for key, units in adoption.head_units(config).items():
            if adoption.kept_heads(units, sizes[key], given) is None:
                raise UserError(
                    f"--head-order: got {head_order}; allowed: a number of shards that divides all heads, and "
                    f"{name} keeps {sizes[key]} of {units.size} heads"
                )
    return adoption.possible_orders(config, members, given)


def _dtype(directory: Path) -> torch.dtype:
    """The element type in which losses are computed: that of the files on a GPU, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    reader = hf.TensorReader(directory)
    return reader.stored(next(iter(reader.files))).entry.dtype


def read_ids(directory: Path, text: Path, tokens: int) -> Tensor:
    """The first `tokens` tokens of a text file in rows of ROW, (B, L) int64. Raises UserError for less than two."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {text}: cannot be read as UTF-8 ({error})") from None
    ids = load_tokenizer(directory)(content[: 32 * tokens])["input_ids"][:tokens]
    if len(ids) < 2:
        raise UserError(f"--text {text}: has {len(ids)} tokens; allowed: 2 or more, better {4 * ROW:,}")
    length = min(ROW, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _check_order(order: int, means: dict[int, float], is_given: bool) -> None:
    """Raise UserError where another head order than the given one fits the weights better."""
    best = min(means, key=means.get)
    if is_given and means[best] < means[order] - CLEARLY:
        raise UserError(
            f"--head-order: got {spelling(order)}, with which the members' mean loss is {means[order]:.3f}; with "
            f"{spelling(best)} it is {means[best]:.3f}, so that order is more likely; --force takes yours"
        )


def _check_losses(whole: float, found: dict[str, float], most_excess: float, vocab_size: int) -> None:
    """Raise UserError for losses of a model that predicts nothing, or of a member that is none."""
    if not whole < math.log(vocab_size):
        raise UserError(
            f"the whole model's loss is {whole:.3f}, no better than guessing ({math.log(vocab_size):.3f}); name a text "
            "of its language with --text, or copy the model again"
        )
    bad = [f"{name} {loss:.3f}" for name, loss in found.items() if not loss <= whole + most_excess]
    if bad:
        raise UserError(
            f"losses above that of the whole model ({whole:.3f}) by more than {most_excess}: {', '.join(bad)}; check "
            "the sizes and layers of these members and --head-order, name another --text, or raise --most-excess"
        )


def _check_expressible(config, members: dict[str, Submodel], order: int) -> None:
    if not adoption.is_expressible(config, members, order):
        raise UserError(
            f"the head order is {spelling(order)}: its members keep different numbers of heads in the groups of a "
            "layer, which no config.json can express; allowed: group, or a multiple of the number of groups as shards"
        )
