"""Chunked losses against plain autograd on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_core.model.ops.cross_entropy import chunked_cross_entropy
from elastic_core.training.losses import IGNORED, distillation_loss, resource_loss
from tests.support.models.parents import relative_error

CASES = [  # CE weight, KL weight, temperature
    (1.0, 0.0, 1.0),
    (0.0, 1.0, 1.0),
    (0.0, 1.0, 2.5),
    (0.3, 0.7, 1.0),
    (0.5, 2.0, 0.7),
]


def draw(seed, tokens=23, width=9, vocab=31, teacher_width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::4] = IGNORED
    hidden, head = normal(tokens, width).requires_grad_(), normal(vocab, width).requires_grad_()
    return hidden, head, labels, (normal(tokens, teacher_width), normal(vocab, teacher_width))


def whole(hidden, head, labels, teacher, ce_weight, kl_weight, temperature):
    """The same losses from whole logits, by torch's own functions."""
    live = labels != IGNORED
    count = live.sum().clamp(min=1)
    logits, target = hidden @ head.T, teacher[0] @ teacher[1].T
    ce = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / count
    scaled, target = (logits / temperature).log_softmax(-1), (target / temperature).log_softmax(-1)
    kl = F.kl_div(scaled[live], target[live], reduction="sum", log_target=True) / count
    return ce_weight * ce + kl_weight * temperature**2 * kl, ce, kl


@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
@pytest.mark.parametrize(("ce_weight", "kl_weight", "temperature"), CASES)
def test_values_and_gradients(ce_weight, kl_weight, temperature, chunk):
    hidden, head, labels, teacher = draw(0)
    ours = distillation_loss(hidden, head, labels, teacher, ce_weight, kl_weight, temperature, chunk)
    reference = whole(hidden, head, labels, teacher, ce_weight, kl_weight, temperature)
    for value, expected in zip(ours, reference, strict=True):
        assert value.dtype == torch.float64 and abs(value - expected) < 1e-12
    for value, expected in zip(
        torch.autograd.grad(3 * ours[0], [hidden, head]),
        torch.autograd.grad(3 * reference[0], [hidden, head]),
        strict=True,
    ):
        assert relative_error(value, expected) < 1e-12
    assert not ours[1].requires_grad and not ours[2].requires_grad


def test_gradcheck():
    hidden, head, labels, teacher = draw(1, tokens=5, width=3, vocab=4)
    assert torch.autograd.gradcheck(
        lambda h, w: distillation_loss(h, w, labels, teacher, 0.4, 0.6, 1.7, 2)[0], [hidden, head]
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision(dtype, tolerance):
    hidden, head, labels, teacher = draw(2, dtype=dtype)
    ours = distillation_loss(hidden, head, labels, teacher, 0.5, 0.5, 1.0, 5)
    wide = [hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()]
    reference = whole(*wide, labels, [t.double() for t in teacher], 0.5, 0.5, 1.0)
    assert ours[0].dtype == torch.float32 and abs(ours[0] / reference[0] - 1) < tolerance
    gradients = torch.autograd.grad(ours[0], [hidden, head])
    for value, expected in zip(gradients, torch.autograd.grad(reference[0], wide), strict=True):
        assert value.dtype == dtype and relative_error(value.double(), expected) < tolerance


def test_no_live_position_gives_zero_and_no_gradient():
    hidden, head, labels, teacher = draw(3)
    for value in (loss := distillation_loss(hidden, head, torch.full_like(labels, IGNORED), teacher, 0.5, 0.5)):
        assert value == 0
    for gradient in torch.autograd.grad(loss[0], [hidden, head]):
        assert not gradient.any()


def test_ignored_positions_take_no_part():
    hidden, head, labels, teacher = draw(4)
    other = torch.where((labels == IGNORED)[:, None], 100.0, hidden.detach()).requires_grad_()
    live = labels != IGNORED
    losses = [distillation_loss(h, head, labels, teacher, 0.5, 0.5)[0] for h in (hidden, other)]
    few = distillation_loss(hidden[live], head, labels[live], (teacher[0][live], teacher[1]), 0.5, 0.5)[0]
    assert abs(losses[0] - losses[1]) < 1e-12 and abs(losses[0] - few) < 1e-12
    assert not torch.autograd.grad(losses[1], other)[0][~live].any()


def test_batches_are_flattened_and_a_teacher_can_be_left_out():
    hidden, head, labels, teacher = draw(5, tokens=24)
    flat = distillation_loss(hidden, head, labels, teacher, 0.5, 0.5)
    shaped = distillation_loss(
        hidden.view(4, 6, -1), head, labels.view(4, 6), (teacher[0].view(4, 6, -1), teacher[1]), 0.5, 0.5
    )
    assert torch.equal(flat[0], shaped[0])
    loss, ce, kl = distillation_loss(hidden, head, labels, ce_weight=1.0, kl_weight=0.0)
    assert loss == ce and kl == 0
    with pytest.raises(ValueError, match="teacher"):
        distillation_loss(hidden, head, labels, ce_weight=1.0)


def test_the_teacher_gets_no_gradient_and_equality_is_the_minimum():
    hidden, head, labels, _ = draw(6)
    teacher = hidden.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
    loss, _, kl = distillation_loss(hidden, head, labels, teacher)
    loss.backward()
    assert abs(kl) < 1e-14 and hidden.grad.abs().max() < 1e-14 and teacher[0].grad is teacher[1].grad is None


def test_a_second_derivative_is_refused():
    hidden, head, labels, teacher = draw(7)
    loss = distillation_loss(hidden, head, labels, teacher)[0]
    (gradient,) = torch.autograd.grad(loss**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("chunk", [3, 23, 100])
def test_chunked_cross_entropy(chunk):
    hidden, head, labels, _ = draw(8)
    expected = F.cross_entropy(hidden @ head.T, labels, ignore_index=IGNORED, reduction="sum")
    assert abs(chunked_cross_entropy(hidden, head, labels, chunk) - expected) < 1e-10


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor made inside had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_whole_logits_never_exist():
    tokens, vocab, chunk = 640, 500, 16
    hidden, head, labels, teacher = draw(9, tokens=tokens, width=8, vocab=vocab, teacher_width=8, dtype=torch.float32)
    with Largest() as largest:
        distillation_loss(hidden, head, labels, teacher, 0.5, 0.5, 2.0, chunk)[0].backward()
        chunked_cross_entropy(hidden, head, labels, chunk)
    assert 0 < largest.numel <= chunk * vocab
    with Largest() as largest:  # the probe does see them where they exist
        whole(hidden, head, labels, teacher, 0.5, 0.5, 2.0)
    assert largest.numel >= tokens * vocab


def test_resource_loss():
    for cost, dead_zone, expected in ((120.0, 0.0, 0.2), (80.0, 0.0, 0.2), (100.5, 0.01, 0.0), (110.0, 0.04, 0.06)):
        cost = torch.tensor(cost, dtype=torch.float64, requires_grad=True)
        loss = resource_loss(cost, 100.0, dead_zone)
        assert abs(loss.item() - expected) < 1e-12
        (gradient,) = torch.autograd.grad(loss, cost)
        assert abs(gradient.item() - (0 if expected == 0 else 0.01 if cost > 100 else -0.01)) < 1e-12
