"""The chunked distillation loss, forward and backward, against the same from logits held whole."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.comparison import MB, in_turn, median_ratio, peak_allocated
from benchmarks.report import Row, at_most, measured, within
from elastic_core.training.estimate.live_bytes import LiveBytes
from elastic_core.training.losses import distillation_loss

MOST_TIME, MOST_MEMORY = 1.10, 1 / 16
ROUNDING = 1e-5  # float32 sums over the vocabulary and over tokens, in another order
# tokens, width, vocabulary. Whole logits of 8,192 tokens x 131,072 words are five matrices of 4.3 GB: time is measured
# with a vocabulary that is halved twice, and the bytes of the real one are counted without having them.
FULL, QUICK, COUNTED = (8192, 256, 32768), (600, 16, 500), (8192, 256, 131072)
STAGE = (960, 128, 1024)  # a microbatch of the default run
REPEATS = 3


def rows(quick: bool) -> Iterator[Row]:
    for shape in (QUICK,) if quick else (STAGE, FULL):
        tokens, width, vocabulary = shape
        ways = {"ours": both_passes(ours, shape), "whole": both_passes(whole, shape)}
        what = f"KL, {tokens:,} tokens × {vocabulary:,} words, width {width}"
        error = max(
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ways["ours"](), ways["whole"](), strict=True)
        )
        yield within("chunked loss = whole", f"{what}: loss and gradients", error, ROUNDING)
        times = in_turn(ways, 1 if quick else REPEATS * (1 if shape is FULL else 20))
        ratio, note = median_ratio(times, "ours", "whole"), f" ({min(times['ours']) * 1e3:.0f} ms)"
        peaks = {name: peak_allocated(take) for name, take in ways.items()}
        memory, held = peaks["ours"] / peaks["whole"], f"{peaks['ours'] / MB:.1f} of {peaks['whole'] / MB:.1f} MB"
        if quick:
            yield measured("chunked loss, time", what, f"{ratio:.2f} ×{note}")
        else:
            yield at_most("chunked loss, time", what, ratio, MOST_TIME, note)
        if shape is FULL:
            yield at_most("chunked loss, memory", what, memory, MOST_MEMORY, f" ({held})")
        else:
            yield measured("chunked loss, memory", what, f"{memory:.3f} × ({held})")
    peaks = {name: counted(loss, COUNTED) for name, loss in {"ours": ours, "whole": whole}.items()}
    tokens, width, vocabulary = COUNTED
    what = f"KL, {tokens:,} tokens × {vocabulary:,} words, width {width}, counted"
    held = f" ({peaks['ours'] / MB:,.0f} of {peaks['whole'] / MB:,.0f} MB)"
    yield at_most("chunked loss, memory", what, peaks["ours"] / peaks["whole"], MOST_MEMORY, held)


def both_passes(loss: Callable[..., Tensor], shape: tuple[int, int, int]) -> Callable[[], list[Tensor]]:
    """The loss and its gradients with respect to hidden states and head. Their own memory counts in neither way."""
    tokens, width, vocabulary = shape
    draw = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(tokens, width, generator=draw) for _ in range(2))
    head, teaching = (torch.randn(vocabulary, width, generator=draw) * width**-0.5 for _ in range(2))
    labels = torch.randint(0, vocabulary, (tokens,), generator=draw)
    hidden.requires_grad_(), head.requires_grad_()

    def take() -> list[Tensor]:
        value = loss(hidden, head, labels, (taught, teaching))
        return [value.detach(), *torch.autograd.grad(value, [hidden, head])]

    return take


def counted(loss: Callable[..., Tensor], shape: tuple[int, int, int]) -> int:
    """Bytes alive at most in loss and gradients, on tensors without memory."""
    tokens, width, vocabulary = shape
    with FakeTensorMode():
        (hidden, taught), (head, teaching) = (
            [torch.empty(size, width) for _ in range(2)] for size in (tokens, vocabulary)
        )
        labels = torch.empty(tokens, dtype=torch.int64)
        hidden.requires_grad_(), head.requires_grad_()
        with LiveBytes() as alive:
            loss(hidden, head, labels, (taught, teaching)).backward()
    return alive.peak


def ours(hidden: Tensor, head: Tensor, labels: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
    return distillation_loss(hidden, head, labels, teacher)[0]


def whole(hidden: Tensor, head: Tensor, labels: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
    """torch's own KL divergence of whole logits, as it is usually written."""
    with torch.no_grad():
        target = F.linear(*teacher).log_softmax(-1)
    return F.kl_div(F.linear(hidden, head).log_softmax(-1), target, reduction="batchmean", log_target=True)
