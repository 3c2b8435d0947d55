"""The state space scan of Mamba-2 (SSD): a naive recurrence and its chunked form in batched matrix products.

Shapes: B batch, L positions, H heads, P head channels, G groups, N state size; R = H/G heads of a group, c chunks,
Q positions of a chunk. Heads [j·R, (j+1)·R) share group j's B and C.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 32  # on a CPU: long enough to fill matrix products, short enough for (Q, Q) to stay in the cache


def ssd_naive(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """h_t = exp(A·dt_t)·h_{t−1} + dt_t·B_t ⊗ x_t;  y_t = C_t·h_t + D·x_t, one position after the other.

    x (B, L, H, P), dt (B, L, H) after softplus and clamp, A (H,) negative, B and C (B, L, G, N), D (H,)
    → y (B, L, H, P).
    """
    batch, length, heads, channels = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))  # (B, L, H, N)
    state = x.new_zeros(batch, heads, channels, B.shape[-1])
    outputs = []
    for t in range(length):
        decay = torch.exp(A * dt[:, t])[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk_size: int = CHUNK) -> Tensor:
    """The same as `ssd_naive`, chunk by chunk: attention-like inside a chunk, a recurrence of states between chunks.

    B and C are never repeated per head, and the (Q, Q) decays are formed again in the backward pass, not kept.
    """
    length = x.shape[1]
    chunk = min(chunk_size, length)
    x_dt, decay = x * dt[..., None], A * dt  # (B, L, H, P), (B, L, H)
    if padding := -length % chunk:  # no input and no decay: states pass through, outputs are cut off below
        x_dt, B, C = (F.pad(t, (0, 0, 0, 0, 0, padding)) for t in (x_dt, B, C))
        decay = F.pad(decay, (0, 0, 0, padding))
    with torch.autocast(x.device.type, enabled=False):  # float32 products, whatever the layers around compute in
        y = _ChunkedScan.apply(x_dt, decay, B, C, chunk)
    return y[:, :length] + D[:, None] * x


class _ChunkedScan(torch.autograd.Function):
    """y_i = Σ_{j≤i} (C_i·B_j) exp(Σ_{j<k≤i} a_k) x_j. x (B, L, H, P), a (B, L, H), B, C (B, L, G, N); Q divides L."""

    @staticmethod
    def forward(ctx, x, a, B, C, chunk):
        shape = (x.shape[0], x.shape[1] // chunk, chunk, B.shape[2])  # B, c, Q, G
        x, a, B, C = (_by_group(t, shape) for t in (x, a, B, C))
        total = a.squeeze(-1).double().cumsum(-1)  # (B, c, G, R, Q); double, see _decay
        B, C = B.squeeze(3), C.squeeze(3)  # (B, c, G, Q, N)
        weights = _decay(total, x.dtype) * (C @ B.mT).unsqueeze(3)  # (B, c, G, R, Q, Q)
        y = weights @ x  # (B, c, G, R, Q, P)
        to_end, from_start = (total[..., -1:] - total).exp().to(x.dtype), total.exp().to(x.dtype)
        states = _carry(B.mT @ _side_by_side(x * to_end[..., None]), from_start[..., -1], forward=True)
        across = _apart(C @ states, y.shape) * from_start[..., None]
        ctx.save_for_backward(x, total, B, C, states, across)
        ctx.shape = shape
        return _by_position(y + across, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, total, B, C, states, across = ctx.saved_tensors
        grad = _by_group(grad, ctx.shape)
        to_end, from_start = (total[..., -1:] - total).exp().to(x.dtype), total.exp().to(x.dtype)
        last = from_start[..., -1]  # (B, c, G, R)

        decay = _decay(total, x.dtype)
        scores = (C @ B.mT).unsqueeze(3)
        grad_x = (decay * scores).mT @ grad
        grad_scores = decay.mul_(grad @ x.mT)  # (B, c, G, R, Q, Q), summed over R below
        # With respect to total_i: a row sum minus a column sum of weights ⊙ grad_weights. Both must be sums of the very
        # same numbers, in double: where the decay is strong, nearly all of them cancel in the sum over i that makes
        # grad_a, and what is left of rounding would be multiplied by dt, or by A.
        product = grad_scores * scores
        grad_total = product.sum(-1, dtype=torch.float64) - product.sum(-2, dtype=torch.float64)
        grad_total += (grad * across).sum(-1, dtype=torch.float64)
        grad_scores = grad_scores.sum(3)  # (B, c, G, Q, Q)

        grad_across = _side_by_side(grad * from_start[..., None])  # (B, c, G, Q, R·P)
        grad_C = grad_scores @ B + grad_across @ states.mT
        grad_states = _carry(C.mT @ grad_across, last, forward=False)  # of what each chunk adds
        grad_carried = (grad_states * states).unflatten(-1, (-1, x.shape[-1])).sum((-1, -3), dtype=torch.float64) * last
        weighted = x * to_end[..., None]
        grad_B = grad_scores.mT @ C + _side_by_side(weighted) @ grad_states.mT
        grad_weighted = _apart(B @ grad_states, x.shape)
        through_end = (weighted * grad_weighted).sum(-1, dtype=torch.float64)
        grad_total -= through_end
        grad_total[..., -1] += through_end.sum(-1) + grad_carried
        grad_x += grad_weighted * to_end[..., None]
        grad_a = grad_total.flip(-1).cumsum(-1).flip(-1).to(x.dtype)[..., None]
        return (
            _by_position(grad_x, ctx.shape),
            _by_position(grad_a, ctx.shape).squeeze(-1),
            _by_position(grad_B.unsqueeze(3), ctx.shape),
            _by_position(grad_C.unsqueeze(3), ctx.shape),
            None,
        )


def _by_group(t: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """(B, L, G·R, ...) → (B, c, G, R, Q, ...); a tensor without a last dimension gets one."""
    t = t if t.dim() == 4 else t[..., None]
    return t.reshape(*shape, -1, t.shape[-1]).permute(0, 1, 3, 4, 2, 5).contiguous()


def _by_position(t: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The inverse of `_by_group`."""
    batch, num_chunks, chunk, _ = shape
    return t.permute(0, 1, 4, 2, 3, 5).reshape(batch, num_chunks * chunk, -1, t.shape[-1])


def _side_by_side(t: Tensor) -> Tensor:
    """(B, c, G, R, Q, P) → (B, c, G, Q, R·P): the heads of a group in one matrix."""
    return t.transpose(3, 4).flatten(4)


def _apart(t: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_side_by_side`."""
    return t.unflatten(-1, (shape[3], shape[5])).transpose(3, 4)


def _decay(total: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(total_i − total_j) for j ≤ i, else 0; total (..., Q) → (..., Q, Q).

    The difference of two sums is taken in two parts of the working precision, so that a strong decay early in the
    chunk does not eat the digits of the weak ones after it.
    """
    coarse = total.to(dtype)
    fine = (total - coarse).to(dtype)
    difference = coarse[..., :, None] - coarse[..., None, :]
    difference += fine[..., :, None] - fine[..., None, :]
    return difference.tril_().exp_().tril_()


def _carry(added: Tensor, decay: Tensor, forward: bool) -> Tensor:
    """The recurrence between chunks over states (B, c, G, N, R·P) that decay by (B, c, G, R) in a chunk.

    Forward: the state at the start of every chunk, from what each chunk adds. Backward: the gradient of what each
    chunk adds, from the gradient of every chunk's first state.
    """
    decay = decay.repeat_interleave(added.shape[-1] // decay.shape[-1], dim=-1)[..., None, :]
    out, state = torch.zeros_like(added), None
    order = range(added.shape[1]) if forward else range(added.shape[1] - 1, -1, -1)
    for i in order:
        if state is not None:
            out[:, i] = state
        elif forward:
            state = torch.zeros_like(added[:, 0])
        if forward:
            state = state * decay[:, i] + added[:, i]
        else:
            state = added[:, i] if state is None else state * decay[:, i] + added[:, i]
    return out
