"""The state space scan, forward and backward on this CPU, against the reference that transformers falls back to."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from benchmarks.comparison import MB, in_turn, median_ratio, peak_allocated
from benchmarks.report import Row, at_most, measured, within
from benchmarks.shapes import scan_inputs
from elastic_core.model.ops.ssd import ssd

MOST_TIME, MOST_MEMORY = 0.40, 0.5
ROUNDING = 1e-5  # of both; about 1e-6 was seen
CHUNK = 128  # a configuration's own default
# sequences, positions, heads, channels, groups, states: the default parent's two stages, and wider ones up to a layer
# of a real parent on an eighth of its heads
SHAPES = (
    (20, 48, 8, 24, 2, 32),
    (10, 96, 8, 24, 2, 32),
    (8, 256, 16, 32, 4, 64),
    (4, 1024, 8, 64, 2, 64),
    (1, 4096, 16, 80, 1, 128),
)
QUICK = ((2, 48, 4, 8, 2, 16), (1, 300, 4, 8, 2, 16))
REPEATS = 9


def reference(x, dt, A, B, C, D) -> Tensor:
    return mamba2_chunk_scan(x, dt, A, B, C, CHUNK, D=D)


def both_passes(scan: Callable, inputs: tuple[Tensor, ...]) -> Callable[[], list[Tensor]]:
    """Forward and backward of a scan: its output and the gradient of every input, for a fixed direction."""
    direction = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    def take() -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in inputs]
        y = scan(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, direction)]

    return take


def rows(quick: bool) -> Iterator[Row]:
    for shape in QUICK if quick else SHAPES:
        sequences, length, heads, channels, groups, states = shape
        inputs = scan_inputs(torch.device("cpu"), length, heads, channels, groups, states, sequences)
        ways = {"ours": both_passes(ssd, inputs), "theirs": both_passes(reference, inputs)}
        what = f"{sequences} × {length} tokens, {heads} heads of {channels}, {groups} groups, state {states}"
        error = max(
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ways["ours"](), ways["theirs"](), strict=True)
        )
        yield within("scan = transformers'", what, error, ROUNDING)
        times = in_turn(ways, 2 if quick else REPEATS)
        ratio, note = median_ratio(times, "ours", "theirs"), f" ({min(times['ours']) * 1e3:.1f} ms)"
        peaks = {name: peak_allocated(take) for name, take in ways.items()}
        memory = peaks["ours"] / peaks["theirs"]
        if quick:
            yield measured("scan, time", what, f"{ratio:.2f} ×{note}")
        else:
            yield at_most("scan, time", what, ratio, MOST_TIME, note)
        yield at_most("scan, memory", what, memory, MOST_MEMORY, f" ({peaks['ours'] / MB:.1f} MB)")
