"""The most that one worker holds during a training step, in bytes by kind: will a stage fit?

State is arithmetic on the layout; what a step allocates comes from the footprints of its pieces, put together in the
order in which a step runs them. Not in it: what an allocator loses between blocks, workspaces of libraries and NCCL,
and the CUDA context (leave about a tenth of a GPU).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from elastic_core.model.dims import Layout, is_matrix, layer_index
from elastic_core.model.elastic_model import HEAD
from elastic_core.training.estimate.piece_memory import Pieces

KINDS = ("weights", "optimizer", "teacher", "gradients", "gathered", "activations", "loss")
FLOAT32 = 4


@dataclass(frozen=True)
class Load:
    """What one worker computes at a time: sequences of so many tokens, and how a step goes on after them.

    `shards`: workers that share one copy of the weights. `accumulates`: a step has more than one microbatch, so that
    gradients are there already. `has_teacher`: a frozen one, beside the model.
    """

    sequences: int
    length: int
    shards: int = 1
    accumulates: bool = False
    has_teacher: bool = True


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which most bytes are alive, and what they are; `kinds` has an entry per KINDS."""

    moment: str
    kinds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def count_parameters(layout: Layout) -> tuple[int, int]:
    """Numbers in matrices, which are sharded, and in everything else, which is not."""
    counts = [0, 0]
    for dims in layout.values():
        counts[not is_matrix(dims)] += math.prod(dim.size for dim in dims)
    return counts[0], counts[1]


def step_peak(pieces: Pieces, load: Load) -> Peak:
    """The largest moment of a step on the parent's whole width: no budget takes more."""
    kinds = state_bytes(pieces, load)
    moments = ((name, kinds | changes) for name, changes in step_moments(pieces, load, kinds["gradients"]))
    return max((Peak(name, dict.fromkeys(KINDS, 0.0) | values) for name, values in moments), key=lambda p: p.total)


def state_bytes(pieces: Pieces, load: Load) -> dict[str, float]:
    """What is there between steps, and the gradients of all weights: float32 weights, two moments, a teacher.

    Matrices are spread over the shards. A frozen teacher's are held in the stage's precision, or elsewhere.
    """
    setting = pieces.setting
    matrices, rest = count_parameters(pieces.layout)
    held = matrices / load.shards + rest
    teacher = FLOAT32 * rest
    if not (setting.distributed and setting.execution.offload_teacher):
        teacher += setting.dtype.itemsize * matrices / load.shards
    return {
        "weights": FLOAT32 * held,
        "optimizer": 2 * FLOAT32 * held,
        "gradients": FLOAT32 * held,
        "teacher": teacher if load.has_teacher else 0.0,
    }


def step_moments(pieces: Pieces, load: Load, gradients: float) -> Iterator[tuple[str, dict[str, float]]]:
    """The moments that may be the largest, in order, each with the kinds that it has besides the state.

    Gradients grow from the last layer to the first, or are all there where a step has more than one microbatch.
    """
    distributed, size = pieces.setting.distributed, pieces.setting.dtype.itemsize
    hidden = float(load.sequences * load.length * pieces.config.hidden_size * size)
    gathered, reduced_block, reduced_root, embeddings = sharding_bytes(pieces, load)
    layers = [pieces.layer(character, load.sequences, load.length) for character in pieces.pattern]
    tail = pieces.tail(load.sequences * load.length, load.has_teacher)
    kept, there = 0.0, gradients if load.accumulates else 0.0
    teacher = hidden if load.has_teacher else 0.0
    for index, layer in enumerate(layers):
        yield f"forward pass of layer {index} ({pieces.pattern[index]})", {
            "gradients": there, "gathered": gathered, "activations": kept + layer.forward, "loss": teacher,
        }  # fmt: skip
        kept += layer.kept
    yield "loss", {
        "gradients": there, "gathered": gathered, "activations": kept, "loss": tail.forward + teacher,
    }  # fmt: skip
    yield "backward pass of the loss", {
        "gradients": there, "gathered": gathered, "activations": kept, "loss": tail.backward,
    }  # fmt: skip
    tied = HEAD not in pieces.layout
    gathered += reduced_block
    if distributed or tied or not load.accumulates:  # in the first two cases it waits for that of the embeddings
        there += tail.gradients
    shards = load.shards * size / FLOAT32 if distributed else 1
    for index, layer in reversed(list(enumerate(layers))):
        kept -= layer.kept
        yield f"backward pass of layer {index} ({pieces.pattern[index]})", {
            "gradients": there, "gathered": gathered, "activations": kept + layer.backward, "loss": 0.0,
        }  # fmt: skip
        if not load.accumulates:
            there += layer.gradients / shards
    head = tail.gradients if distributed or (tied and load.accumulates) else 0.0
    yield "gradients of the embeddings", {
        "gradients": gradients + head + (embeddings if load.accumulates or (tied and not distributed) else 0.0),
        "gathered": gathered + reduced_root, "activations": hidden, "loss": 0.0,
    }  # fmt: skip


def sharding_bytes(pieces: Pieces, load: Load) -> tuple[float, float, float, float]:
    """What sharding holds besides shards: gathered weights, a block's and the root's gradients as float32 on their way.

    Gathered are the embeddings and heads of both models, and two blocks, the second while the first computes. The
    last number is the gradient of the embeddings, as it comes.
    """
    root, blocks = 0, {}
    for name, dims in pieces.layout.items():
        matrices, _ = count_parameters({name: dims})
        if (layer := layer_index(name)) is None:
            root += matrices
        else:
            blocks[layer] = blocks.get(layer, 0) + matrices
    size, embeddings = pieces.setting.dtype.itemsize, pieces.config.vocab_size * pieces.config.hidden_size
    if not pieces.setting.distributed:
        return 0.0, 0.0, 0.0, float(FLOAT32 * embeddings)
    largest, models = max(blocks.values()), 2 if load.has_teacher else 1
    gathered = size * (models * root + 2 * largest)
    return float(gathered), float(FLOAT32 * largest), float(FLOAT32 * root), float(size * embeddings)
