"""Matching of states: the student's residual stream after every kept layer against the teacher's after the same layer.

Both models have one basis, because training starts from the teacher's own weights: channel i of the student is channel
i of the teacher. A student with k channels is compared with the teacher's first k.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic_core.data.loader import IGNORED_LABEL
from elastic_core.model import architectures
from elastic_core.model.slicing import Slice

NUMBERS_PER_CHUNK = 2**22  # tokens × channels that are compared at a time: 16 MiB in float32


class StateLoss(torch.autograd.Function):
    """Σ over tokens of weight · ‖s/rms(s) − t/rms(t)‖² / k. states s and target t (tokens, k), weights (tokens, 1).

    The forward pass also computes the gradient of s, chunk by chunk, and writes it over `target`. So no further matrix
    (tokens, k) exists until the backward pass, which only scales the gradient.
    """

    @staticmethod
    def forward(ctx, states, target, weights, eps, chunk):
        wide, width = torch.promote_types(states.dtype, torch.float32), states.shape[-1]
        weights, loss = weights.to(wide), states.new_zeros((), dtype=wide)
        for start in range(0, len(states), chunk):
            part = slice(start, start + chunk)
            normed, inverse = _normalise(states[part].to(wide), eps)
            difference = _normalise(target[part].to(wide), eps)[0]
            torch.sub(normed, difference, out=difference)  # exactly 0 if both are equal, also with fused operations
            squares = torch.linalg.vector_norm(difference, dim=-1, keepdim=True).square_()
            loss += (squares * weights[part]).sum() / width
            # The derivative of s/rms(s) has no part along s.
            along = torch.linalg.vecdot(normed, difference)[:, None] / width
            difference.addcmul_(normed, along, value=-1)
            torch.mul(difference, weights[part] * inverse * (2 / width), out=target[part])
        ctx.save_for_backward(target)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None, None


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x), 1 / rms(x)) over the last dimension; rms(x)² is the mean of x² plus eps, as in the model's norms."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def state_loss(states: Tensor, target: Tensor, weights: Tensor, eps: float, chunk: int | None = None) -> Tensor:
    """Σ over positions of weight · ‖s/rms(s) − t/rms(t)‖² / k, (), in float32 or the type of `states` if it is wider.

    - `states` s (..., k): the student's. `target` t (..., k), contiguous: the teacher's. It is overwritten.
    - `weights` (...): the weight of each position. Positions of weight 0 get no gradient.
    - `eps`: what is added to the mean square of the k channels, so that states of 0 are allowed.
    - `chunk`: number of positions that are compared at a time (None: see `NUMBERS_PER_CHUNK`).
    """
    width = states.shape[-1]
    chunk = chunk or max(1, NUMBERS_PER_CHUNK // width)
    return StateLoss.apply(states.flatten(0, -2), target.view(-1, width), weights.view(-1, 1), eps, chunk)


class StateMatching:
    """The state loss of one microbatch.

    Call the teacher with `record`, then the student with `match`, as `after_layer` of `hidden_states`. `record` keeps
    only what `match` needs: the first k channels after the student's layers.

    - `config`: of both models. `sliced`: the student's slice, without gates.
    - `labels` (B, L): positions with IGNORED_LABEL take no part.
    - `num_labelled` (): the number of positions with a label, on all ranks.
    """

    def __init__(self, config, sliced: Slice, labels: Tensor, num_labelled: Tensor):
        self.layers, self.width = frozenset(sliced.kept_layers), sliced.sizes["hidden"]
        self.eps = architectures.of(config).norm_eps(config)
        self.weights = (labels != IGNORED_LABEL).double() / num_labelled
        self.targets: dict[int, Tensor] = {}
        self.losses: list[Tensor] = []

    def record(self, layer: int, x: Tensor) -> None:
        """Keep the teacher's states x (B, L, D) after `layer`, if the student has this layer."""
        if layer in self.layers:
            self.targets[layer] = x[..., : self.width].contiguous()

    def match(self, layer: int, x: Tensor) -> None:
        """Compare the student's states x (B, L, k) after `layer` with the teacher's."""
        self.losses.append(state_loss(x, self.targets.pop(layer), self.weights, self.eps))

    def loss(self) -> Tensor:
        """L_state (): the mean over the student's layers."""
        return torch.stack(self.losses).mean()
