"""The peak memory of one worker during a training step, in bytes by kind. It tells whether a stage fits on a GPU.

The state (weights, optimizer, gradients) is counted from the layout of the parameters. What a step allocates is the sum
over its pieces (see `piece_memory`), in the order in which a step runs them. Not counted: fragmentation of the
allocator, workspaces of libraries and NCCL, and the CUDA context. Leave about 10 % of a GPU for them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from elastic_core.model import architectures
from elastic_core.model.dims import Layout, is_matrix, layer_index
from elastic_core.model.elastic_model import HEAD
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.estimate.live_bytes import TrainingSetting
from elastic_core.training.estimate.piece_memory import Pieces
from elastic_core.training.optimizer import block_size

KINDS = ("weights", "optimizer", "teacher", "gradients", "gathered", "activations", "loss")
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Workload:
    """What one worker computes in a microbatch: `sequences` sequences, `length` tokens of each.

    - `sharing`: the number of workers that share a sequence. Its whole length is `length` times this.
    - `shards`: the number of workers that share one copy of the weights.
    - `accumulates`: a step has several microbatches. So from the second one on, all gradients exist from the start.
    - `has_teacher`: the worker also holds a frozen teacher.
    - `matches_states`: the loss matches the teacher's states. The worker holds them for every layer. If only smaller
      budgets match states, this counts more than they hold.
    - `budgets_with_norms`: the number of budgets that train norm gains of their own.
    - `has_8bit_moments`: the optimizer is adamw8bit.
    - `kept_logits`: how many logits per position a cached teacher has; 0 without one. Before the first step, a worker
      that has no such cache yet holds the frozen teacher, too.
    """

    sequences: int
    length: int
    shards: int = 1
    accumulates: bool = False
    has_teacher: bool = True
    matches_states: bool = False
    budgets_with_norms: int = 0
    kept_logits: int = 0
    sharing: int = 1
    has_8bit_moments: bool = False


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which memory is highest. `kinds` holds the bytes for each of KINDS."""

    moment: str
    kinds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def count_parameters(layout: Layout) -> tuple[int, int]:
    """(number of parameters in matrices, number of other parameters). FSDP shards only the matrices."""
    counts = [0, 0]
    for dims in layout.values():
        counts[not is_matrix(dims)] += math.prod(dim.size for dim in dims)
    return counts[0], counts[1]


def step_peak(pieces: Pieces, load: Workload) -> Peak:
    """The peak of a step that trains the full model. No smaller budget needs more."""
    kinds = state_bytes(pieces, load)
    moments = [(name, kinds | changes) for name, changes in step_moments(pieces, load, kinds["gradients"])]
    if load.kept_logits:
        moments.append(("logits of the teacher, before the first step", cache_moment(pieces, load)))
    return max((Peak(name, dict.fromkeys(KINDS, 0.0) | values) for name, values in moments), key=lambda p: p.total)


def state_bytes(pieces: Pieces, load: Workload) -> dict[str, float]:
    """The bytes of weights and optimizer (both float32), of a frozen teacher, and of the gradients of all weights.

    Matrices are sharded; norms, with those of budgets, are not. The matrices of a frozen teacher are in the stage's
    precision. With `reduce_once` and several microbatches, gradients are whole. Offloaded matrices (`offload_teacher`,
    `offload_student`) are not on the GPU and do not count.
    """
    setting = pieces.setting
    matrices, rest = count_parameters(pieces.layout)
    norm_gains = load.budgets_with_norms * len(architectures.norm_names(pieces.config)) * pieces.config.hidden_size
    held = rest + norm_gains + (0 if is_offloaded(setting) else matrices / load.shards)
    is_whole = setting.distributed and setting.execution.reduce_once and load.accumulates
    teacher = FLOAT32 * rest
    if not (setting.distributed and setting.execution.offload_teacher):
        teacher += setting.dtype.itemsize * matrices / load.shards
    return {
        "weights": FLOAT32 * held,
        "optimizer": moment_bytes(pieces, load, held),
        "gradients": FLOAT32 * (rest + norm_gains + matrices if is_whole else held),
        "teacher": teacher if load.has_teacher else 0.0,
    }


def moment_bytes(pieces: Pieces, load: Workload, held: float) -> float:
    """The bytes of the two moments of `held` parameters; with 8 bits, a number of a matrix has a byte and its scale."""
    saved = 0.0
    if load.has_8bit_moments and not is_offloaded(pieces.setting):
        for dims in pieces.layout.values():
            shape = [dim.size for dim in dims]
            block = block_size(torch.empty(shape, device="meta")) if is_matrix(dims) else None
            saved += 0 if block is None else math.prod(shape) * (FLOAT32 - 1 - FLOAT32 / block)
    return 2 * (FLOAT32 * held - saved / load.shards)


def is_offloaded(setting: TrainingSetting) -> bool:
    """Whether the shards of the trained model are in CPU memory."""
    return setting.distributed and setting.execution.offload_student


def host_bytes(pieces: Pieces, load: Workload) -> float:
    """The bytes of offloaded shards in CPU memory, of one worker: of the trained model with gradients and two moments,
    and of a frozen teacher.
    """
    setting, matrices = pieces.setting, count_parameters(pieces.layout)[0] / load.shards
    student = 4 * FLOAT32 * matrices if is_offloaded(setting) else 0.0
    has_teacher = load.has_teacher and setting.distributed and setting.execution.offload_teacher
    return student + (setting.dtype.itemsize * matrices if has_teacher else 0.0)


def cache_moment(pieces: Pieces, load: Workload) -> dict[str, float]:
    """The bytes by kind while the logits of a teacher are computed: no optimizer and no gradients exist yet."""
    with_teacher = dataclasses.replace(load, has_teacher=True)
    kinds, gathered = state_bytes(pieces, with_teacher), sharding_bytes(pieces, load)[0]
    whole = Pieces.of(
        pieces.config, dataclasses.replace(pieces.setting, execution=Execution())
    )  # no sequence is shared
    sequences, length = max(1, load.sequences // load.sharing), load.length * load.sharing
    layers = (whole.layer(character, sequences, length) for character in set(pieces.pattern))
    return {
        "weights": kinds["weights"],
        "teacher": kinds["teacher"],
        "gathered": gathered,
        "activations": whole.mask(sequences, length) + max(layer.forward for layer in layers),
        "loss": whole.tail(sequences * length, False).forward,
    }


def step_moments(pieces: Pieces, load: Workload, gradients: float) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, bytes by kind) of every moment of a step that may be the peak, in order.

    The kinds are those that change during a step. `gradients` is the size of all gradients. With one microbatch per
    step, gradients appear layer by layer from the last to the first. With several, all of them exist from the start.
    If states are matched, the teacher's states of all layers exist when the student starts. The state loss turns them
    into gradients, and each is freed when the backward pass reaches its layer.
    """
    distributed, size = pieces.setting.distributed, pieces.setting.dtype.itemsize
    hidden = float(load.sequences * load.length * pieces.config.hidden_size * size)
    gathered, reduced_block, reduced_root, embeddings = sharding_bytes(pieces, load)
    layers = [pieces.layer(character, load.sequences, load.length) for character in pieces.pattern]
    tail = pieces.tail(load.sequences * load.length, load.has_teacher, load.kept_logits)
    kept = pieces.mask(load.sequences, load.length)
    existing = gradients if load.accumulates else 0.0  # bytes of the gradients at this moment
    teacher = hidden if load.has_teacher else 0.0
    states = pieces.states(load.sequences * load.length) if load.matches_states else None
    matched = len(layers) * hidden if load.matches_states else 0.0
    for index, layer in enumerate(layers):
        yield f"forward pass of layer {index} ({pieces.pattern[index]})", {
            "gradients": existing, "gathered": gathered, "activations": kept + layer.forward, "loss": teacher + matched,
        }  # fmt: skip
        kept += layer.kept
        if states is not None:
            yield f"state loss of layer {index} ({pieces.pattern[index]})", {
                "gradients": existing, "gathered": gathered, "activations": kept,
                "loss": teacher + matched + states.forward - states.kept,
            }  # fmt: skip
    yield "loss", {
        "gradients": existing, "gathered": gathered, "activations": kept, "loss": tail.forward + teacher + matched,
    }  # fmt: skip
    yield "backward pass of the loss", {
        "gradients": existing, "gathered": gathered, "activations": kept, "loss": tail.backward + matched,
    }  # fmt: skip
    tied = HEAD not in pieces.layout
    gathered += reduced_block
    # The head's gradient. With sharding or tied embeddings, it is held until that of the embeddings is computed.
    if distributed or tied or not load.accumulates:
        existing += tail.gradients
    shards = load.shards * size / FLOAT32 if distributed else 1
    for index, layer in reversed(list(enumerate(layers))):
        kept -= layer.kept
        matched = index * hidden if load.matches_states else 0.0
        yield f"backward pass of layer {index} ({pieces.pattern[index]})", {
            "gradients": existing, "gathered": gathered, "activations": kept + layer.backward, "loss": matched,
        }  # fmt: skip
        if not load.accumulates and not is_offloaded(pieces.setting):
            existing += layer.gradients / shards
    head = tail.gradients if distributed or (tied and load.accumulates) else 0.0
    yield "gradients of the embeddings", {
        "gradients": gradients + head + (embeddings if load.accumulates or (tied and not distributed) else 0.0),
        "gathered": gathered + reduced_root, "activations": hidden, "loss": 0.0,
    }  # fmt: skip


def sharding_bytes(pieces: Pieces, load: Workload) -> tuple[float, float, float, float]:
    """The bytes that FSDP needs besides the shards: (gathered weights, gradients of a block, of the root, embeddings).

    - Gathered are embeddings and head of model and teacher, and two blocks: while one computes, the next is gathered.
    - The gradients of a block and of the root (embeddings and head) are in float32 while they are reduced.
    - The last number is the gradient of the embeddings before it is reduced. Without FSDP, it is the only one that is
      not 0.
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
