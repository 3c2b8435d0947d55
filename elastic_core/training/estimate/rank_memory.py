"""The peak memory of one worker in stage `rank`, in bytes by kind.

The weights are counted from the layout of the parameters. What a forward pass allocates is counted as for training (see
`piece_memory`): the stage's own code runs on tensors without storage. Not counted: see `step_memory`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic_core.model import architectures
from elastic_core.model.dims import elastic_units, layer_index
from elastic_core.model.layers import Norm, part_of
from elastic_core.model.ops.cross_entropy import CHUNK, chunked_cross_entropy
from elastic_core.model.slicing import Observer, Slice
from elastic_core.model.submodel import full_sizes
from elastic_core.search.importance import depth
from elastic_core.search.importance.basis import RatioSums
from elastic_core.search.importance.widths import WidthSums
from elastic_core.training.distributed.placement import matrices_to_
from elastic_core.training.estimate.live_bytes import LiveBytes, PieceMemory, extrapolate
from elastic_core.training.estimate.piece_memory import Pieces
from elastic_core.training.estimate.step_memory import FLOAT32, Peak, count_parameters

KINDS = ("weights", "gathered", "sums", "activations")
FLOAT64 = 8  # bytes
TOKEN = 8 + 8 + 4 + 8 + 1  # bytes of a position: input id, label, and three numbers of its document
SCAN_LENGTH = 1024  # see `piece_memory`


@dataclass(frozen=True)
class RankWorkload:
    """What one worker computes: `batches` times `sequences` sequences of `length` tokens, as in section `rank`.

    - `shards`: the number of workers that share one copy of the weights.
    - `held`: the type in which the worker holds its part of the matrices.
    """

    sequences: int
    length: int
    batches: int
    depth_batches: int
    held: torch.dtype
    shards: int = 1
    measure: str = "output_norm"
    aggregation: str = "l2"
    depth_method: str = "iterative_nmse"
    is_rotated: bool = True
    private_norms: bool = True


def rank_peak(config, setting, load: RankWorkload) -> Peak:
    """The moment of the stage at which memory is highest. `setting`: a `TrainingSetting`."""
    passes, held = ForwardPasses.of(config, setting), held_bytes(config, load)
    root, in_pass = gathered_bytes(config, setting)
    gathering = {"gathered": root + 1.5 * (in_pass - root)}
    moments = (
        ("gathering of the embeddings", {"gathered": 2 * root}),
        *((name, {"gathered": in_pass} | kinds) for name, kinds in rank_moments(passes, load, root)),
        *((f"gathering of a block, {name}", gathering | kinds) for name, kinds in between_blocks(passes, load)),
        ("sorting", {"activations": sorting_bytes(config, load)}),
    )
    peaks = (Peak(name, dict.fromkeys(KINDS, 0.0) | {"weights": held} | kinds) for name, kinds in moments)
    return max(peaks, key=lambda peak: peak.total)


def held_bytes(config, load: RankWorkload) -> float:
    """The bytes that a worker holds of the weights: its part of the matrices, and all other parameters in float32."""
    matrices, rest = count_parameters(architectures.parameter_layout(config))
    return load.held.itemsize * matrices / load.shards + FLOAT32 * rest


def gathered_bytes(config, setting) -> tuple[float, float]:
    """The bytes of gathered weights: of embeddings and head, which stay gathered, and of all that is there in a pass.

    FSDP gathers into one buffer and copies it to the parameters. So in a pass, a block is there twice: once as the
    buffer. While the next block is copied, the buffer of the last one is still there too (see `between_blocks`).
    """
    if not setting.distributed:
        return 0.0, 0.0
    root, blocks = 0, {}
    for name, dims in architectures.parameter_layout(config).items():
        matrices, _ = count_parameters({name: dims})
        if (layer := layer_index(name)) is None:
            root += matrices
        else:
            blocks[layer] = blocks.get(layer, 0) + matrices
    size = setting.dtype.itemsize
    return float(size * root), float(size * (root + 2 * max(blocks.values())))


def sorting_bytes(config, load: RankWorkload) -> float:
    """The largest matrix in float32 before and after it is permuted or rotated; and the axes, once with gains."""
    largest = max(count_parameters({name: dims})[0] for name, dims in architectures.parameter_layout(config).items())
    return 2.0 * FLOAT32 * largest + (2 * FLOAT64 * config.hidden_size**2 if load.is_rotated else 0)


def rank_moments(passes: ForwardPasses, load: RankWorkload, root: float) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, bytes by kind) of every moment that may be the peak: scores of the widths, ratios of norms, layers.

    `root`: the bytes of what stays gathered outside of a pass.
    """
    tokens, sums = token_bytes(passes, load), passes.sums(load)
    layers = {kind: passes.pattern.index(kind) for kind in dict.fromkeys(passes.pattern)}
    for kind, index in layers.items():
        peak = passes.layer(kind, load, "widths")
        yield f"widths, layer {index} ({kind})", {"sums": sums, "activations": tokens + peak}
    yield "sum over workers", {"gathered": root, "sums": 2 * sums, "activations": tokens}
    if load.private_norms:  # a layer needs no more than for the widths, but its norm may
        hidden, norms = passes.config.hidden_size, len(architectures.norm_names(passes.config))
        kept = float(FLOAT64 * (norms * hidden + (hidden**2 if load.is_rotated else 0)))
        yield "norm ratios", {"sums": kept, "activations": tokens + passes.ratios(load)}
    yield from depth_moments(passes, load, root, layers, tokens)


def depth_moments(
    passes: ForwardPasses, load: RankWorkload, root: float, layers: dict[str, int], tokens: float
) -> Iterator[tuple[str, dict[str, float]]]:
    """The moments of the depth ranking."""
    sequences, held, stream = depth_states(passes, load)
    tokens += float(load.depth_batches * load.sequences * load.length * TOKEN)  # their documents once more
    kept = {"sums": passes.gram_bytes() if held else 0.0}
    for kind, index in layers.items():
        peak = passes.layer(kind, load, "depth", sequences)
        yield f"depth, layer {index} ({kind})", kept | {"activations": tokens + held + stream + peak}
    peak = passes.logits(load, sequences)
    yield "depth, logits", kept | {"gathered": root, "activations": tokens + held + stream + peak}
    if held:
        yield "depth, Gram matrix of the head", {"gathered": root, "activations": tokens + passes.gram_peak()}


def depth_states(passes: ForwardPasses, load: RankWorkload) -> tuple[int, float, float]:
    """What the depth ranking holds: (sequences at a time, bytes of the final states that it holds, of other states).

    The others are the residual stream before the candidate layer, and the final states of a batch that are not held.
    """
    parts = max(1, min(load.sequences, -(-depth.MIN_PIECES // load.depth_batches)))
    sequences = -(-load.sequences // parts) if load.depth_method == "iterative_nmse" else load.sequences
    if load.depth_method == "one_shot_perplexity":
        return sequences, 0.0, 0.0
    row = load.length * passes.config.hidden_size * passes.setting.dtype.itemsize
    return sequences, float(min(load.depth_batches * load.sequences * row, depth.HELD_BYTES)), 2.0 * sequences * row


def between_blocks(passes: ForwardPasses, load: RankWorkload) -> Iterator[tuple[str, dict[str, float]]]:
    """What there is between two blocks, in passes for the widths and for the depth ranking."""
    row = float(load.length * passes.config.hidden_size * passes.setting.dtype.itemsize)
    tokens, (sequences, held, stream) = token_bytes(passes, load), depth_states(passes, load)
    yield "widths", {"sums": passes.sums(load), "activations": tokens + load.sequences * row}
    yield (
        "depth",
        {
            "sums": passes.gram_bytes() if held else 0.0,
            "activations": tokens + held + stream + sequences * row,
        },
    )


def token_bytes(passes: ForwardPasses, load: RankWorkload) -> float:
    """The bytes of the token ids of all batches, of their documents, and of masks that hide other documents."""
    return float(load.batches * (TOKEN * load.sequences * load.length + passes.mask(load.sequences, load.length)))


class ForwardPasses(Pieces):
    """The memory of forward passes without gradients, piece by piece, with what the stage computes of activations."""

    @functools.cache  # noqa: B019 (as in Pieces)
    def layer(self, character: str, load: RankWorkload, what: str, sequences: int | None = None) -> float:
        """The peak in one layer, with its input. `what`: ``widths`` or ``depth``."""
        sequences = sequences or load.sequences

        def count(length: int) -> PieceMemory:
            return self._count(character, sequences, length, load, what)

        block = self.architecture.scan_block(self.config, self.pattern.index(character), sequences)
        if block is None or self.setting.gpu:
            return count(load.length).forward
        short = max(SCAN_LENGTH, 2 * block)
        return extrapolate(count, load.length, (short, 2 * short)).forward

    def _count(self, character: str, sequences: int, length: int, load: RankWorkload, what: str) -> PieceMemory:
        index = self.pattern.index(character)
        # Devices as in `Pieces`: there it is said why.
        on_meta = self.setting.gpu and self.architecture.scan_block(self.config, index, sequences) is not None
        documents = None if on_meta else self._documents(sequences, length)
        with torch.device("meta") if on_meta else FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            if documents is not None and self.mask(sequences, length):
                documents.mask(self.setting.dtype)  # before anything is counted
            block, sliced = self._make_block(index), self._observed(load, what)
            return self._peak((sequences, length), lambda x, documents=documents: block(x, sliced, documents))

    def ratios(self, load: RankWorkload) -> float:
        """The peak in a norm, with its input, while ratios are measured."""
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            norm, sliced = self._make_norm(), self._observed(load, "ratios")
            return self._peak((load.sequences, load.length), lambda x, _=None: norm(x, sliced)).forward

    def logits(self, load: RankWorkload, sequences: int) -> float:
        """The peak where final states become the error of logits or a loss, with the states."""
        config, dtype = self.config, self.setting.dtype
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            norm, sliced = self._make_norm(), self._observed(load, "depth")
            if load.depth_method == "one_shot_perplexity":
                length = min(sequences * load.length, CHUNK)
                head = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
                labels = torch.empty(length, dtype=torch.int64)
                chunk = self._peak(
                    (1, length), lambda x, _=None: chunked_cross_entropy(x.flatten(0, 1), head, labels[: x.shape[1]])
                ).forward
                return chunk + sequences * load.length * config.hidden_size * dtype.itemsize
            gram = torch.empty(config.hidden_size, config.hidden_size, dtype=torch.float64)
            return self._peak(
                (sequences, load.length), lambda x, _=None: depth.squared(norm(x, sliced), gram, torch.empty_like(x))
            ).forward

    def gram_bytes(self) -> float:
        """The bytes of the Gram matrix of the head."""
        return float(FLOAT64 * self.config.hidden_size**2)

    def gram_peak(self) -> float:
        """The peak while it is computed."""
        with FakeTensorMode(), torch.no_grad():
            head = torch.empty(self.config.vocab_size, self.config.hidden_size, dtype=self.setting.dtype)
            with LiveBytes() as live:
                depth.gram_of(head)
            return float(live.peak)

    def sums(self, load: RankWorkload) -> float:
        """The bytes of all sums for the widths."""
        count = self.config.hidden_size + (self.config.hidden_size**2 if load.is_rotated else 0)
        units = elastic_units(self.layout)
        for key, unit in units.items():
            axis, _, layer = key.partition(".")
            if axis == "mamba_heads":
                count += unit.size * units[f"mamba_channels.{layer}"].size
            elif axis == "expert_ffn":
                count += unit.size * units[f"experts.{layer}"].size
            elif axis not in ("hidden", "mamba_channels"):
                count += unit.size
        return float(FLOAT64 * count)

    def _make_norm(self) -> Norm:
        name = f"model.{self.architecture.FINAL_NORM}"
        return Norm(f"{name}.weight", self.architecture.norm_eps(self.config), part_of(self.layout, name))

    def _observed(self, load: RankWorkload, what: str) -> Slice:
        """The slice of the whole model, with the observer of a part of the stage."""
        observe: Observer | None = None
        if what == "widths":
            units = elastic_units(self.layout)
            observe = WidthSums(self.config, units, load.measure, load.aggregation, load.is_rotated).observe
        elif what == "ratios":
            hidden = self.config.hidden_size
            axes = torch.empty(hidden, hidden, dtype=torch.float64) if load.is_rotated else None
            observe = RatioSums(self.config, axes, torch.arange(hidden)).observe
        return Slice(
            self.layout, torch.device("cpu"), full_sizes(self.config), tuple(range(len(self.pattern))), None, observe
        )

    def _in_training_precision(self, module: nn.Module) -> nn.Module:
        """Give the matrices the type in which they are multiplied: they are held or gathered in it."""
        if self.setting.precision == "bfloat16":
            matrices_to_(module, torch.bfloat16)
        return module

    def _peak(self, shape: tuple[int, int], piece: Callable[..., Tensor]) -> PieceMemory:
        """`forward`: the peak of piece(x). A pass before it, on one position, makes the sums, which do not count."""
        source = torch.empty(*shape, self.config.hidden_size, dtype=self.setting.dtype)
        with (
            LiveBytes() as live,
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.setting.precision == "bfloat16"),
        ):
            piece(source[:1, :1].clone(), None)
            sums, live.peak = live.now, live.now
            x = source.clone()
            y = piece(x)
            del x, y
        return PieceMemory(0.0, 0.0, float(live.peak - sums), 0.0, 0.0)
