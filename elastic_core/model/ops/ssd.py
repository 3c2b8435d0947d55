"""The state space scan of Mamba-2 (SSD): a naive recurrence and its chunked form in batched matrix products.

Shapes: B batch, L positions, H heads, P head channels, G groups, N state size; R = H/G heads of a group, c chunks,
Q positions of a chunk. Heads [j·R, (j+1)·R) share group j's B and C.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64  # positions: long enough to fill matrix products, with few enough (Q, Q) decays
CHUNK_OF_SMALL_STATES = 32  # where a state of fewer than SMALL entries costs little to carry, and there are many chunks
SMALL = 4096
CHUNK_ON_GPU = 128
# Entries of the (Q, Q) decays that exist at a time: 2 MB, near enough to stay in the cache from one operation to the
# next, and enough for threads to share an operation.
BLOCK, BLOCK_ON_GPU = 2**19, 2**26


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


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk: int | None = None,
    block: int | None = None,
) -> Tensor:
    """The same as `ssd_naive`, chunk by chunk: attention-like inside a chunk, a recurrence of states between chunks.

    `chunk`: at most so many positions of a chunk; `block`: entries of the decays that exist at a time. B and C are
    never repeated per head, and nothing of size (Q, Q) is kept for the backward pass, which forms it again.
    """
    is_cpu, length = x.device.type == "cpu", x.shape[1]
    if chunk is None and is_cpu:
        chunk = CHUNK_OF_SMALL_STATES if length > CHUNK and x.shape[3] * B.shape[3] < SMALL else CHUNK
    at_most = min(chunk or CHUNK_ON_GPU, length)
    even = -(-length // -(-length // at_most))  # as many chunks, but alike, so that little is padded
    # float32 products, whatever the layers around compute in; tensors on the meta device have no autocast
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        block = block or (BLOCK if is_cpu else BLOCK_ON_GPU)
        return _Scan.apply(x, dt, A, B, C, D, even, block)


class _Scan(torch.autograd.Function):
    """y_i = D·x_i + Σ_{j≤i} (C_i·B_j) exp(Σ_{j<k≤i} A·dt_k) dt_j·x_j, a few sequences or chunks (a block) at a time."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, chunk, block):
        y, kept = _empty(x, chunk), []
        for rows, parts in _blocks(x.shape, chunk, block):
            state = None
            for part in parts:
                p = _prepare(x[rows, part], dt[rows, part], A, B[rows, part], C[rows, part], chunk)
                out = _decay(p.total, x.dtype).mul_(p.scores) @ p.x_dt  # (B, c, G, R, Q, P)
                if x.shape[1] > chunk:
                    states = _carry(p.B.mT @ _side_by_side(p.x_dt, p.to_end), p.from_start[..., -1], state)
                    across = p.C @ states[:, :-1]  # (B, c, G, Q, R·P)
                    out.addcmul_(_apart(across, out.shape), p.from_start[..., None])
                    state = states[:, -1]
                    kept += [states, across]
                out.addcmul_(p.x, D.view(*out.shape[2:4], 1, 1))
                _grouped(y[rows, part], p.B.shape).copy_(out)
        ctx.save_for_backward(x, dt, A, B, C, D, *kept)
        ctx.sizes = chunk, block
        return y[:, : x.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, dt, A, B, C, D, *kept = ctx.saved_tensors
        chunk, block = ctx.sizes
        grads = [_empty(t, chunk) for t in (x, dt[..., None], B, C)]
        grad_A, grad_D = torch.zeros_like(A, dtype=torch.float64), torch.zeros_like(D)
        for rows, parts in reversed(_blocks(x.shape, chunk, block)):
            grad_state = None
            for part in reversed(parts):
                p = _prepare(x[rows, part], dt[rows, part], A, B[rows, part], C[rows, part], chunk)
                g = _grouped(_padded(grad[rows, part], chunk), p.B.shape).contiguous()
                across, states = (kept.pop(), kept.pop()) if kept else (None, None)
                of_x_dt, of_decay, of_B, of_C, grad_state = _differentiate(p, g, states, across, grad_state)
                grad_x, grad_dt, grad_B, grad_C = (_grouped(t[rows, part], p.B.shape) for t in grads)
                D_, A_ = (t.view(*g.shape[2:4], 1, 1) for t in (D, A))
                of_decay = of_decay[..., None]
                grad_dt.copy_((of_x_dt * p.x).sum(-1, keepdim=True).add_(of_decay * A_))
                grad_x.copy_(of_x_dt.mul_(p.dt).addcmul_(g, D_))
                grad_B.copy_(of_B.unsqueeze(3))
                grad_C.copy_(of_C.unsqueeze(3))
                grad_A += (of_decay * p.dt).sum((0, 1, 4, 5)).flatten()
                grad_D += (g * p.x).sum((0, 1, 4, 5)).flatten()
        grad_x, grad_dt, grad_B, grad_C = (t[:, : x.shape[1]] for t in grads)
        return grad_x, grad_dt.squeeze(-1), grad_A.to(A.dtype), grad_B, grad_C, grad_D, None, None


class _Block(NamedTuple):
    """What both passes need of a block: inputs by group, and the decays' exponents."""

    x: Tensor  # (B, c, G, R, Q, P), a view
    dt: Tensor  # (B, c, G, R, Q, 1), a view
    x_dt: Tensor  # their product
    B: Tensor  # (B, c, G, Q, N)
    C: Tensor
    total: Tensor  # (B, c, G, R, Q): log2 of the decay since the chunk's start; double, see _decay
    from_start: Tensor  # 2^total
    to_end: Tensor  # the decay to the chunk's end
    scores: Tensor  # (B, c, G, 1, Q, Q): C_i·B_j


def _blocks(shape: torch.Size, chunk: int, block: int) -> list[tuple[slice, list[slice]]]:
    """Sequences, and the positions of every block of them: about `block` entries of decays, or one chunk of one."""
    batch, length, heads, _ = shape
    size = heads * chunk * chunk  # of one chunk
    together = -(-batch // min(batch, max(1, round(batch * size / block))))
    step = chunk * max(1, block // (together * size))
    parts = [slice(start, start + step) for start in range(0, length, step)]  # the last may end beyond the sequence
    return [(slice(start, start + together), parts) for start in range(0, batch, together)]


def _prepare(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> _Block:
    # Padding has no input and no decay: states pass through it, what they get of outputs and gradients is cut off.
    x, dt, B, C = (_padded(t, chunk) for t in (x, dt[..., None], B, C))
    shape = (x.shape[0], x.shape[1] // chunk, B.shape[2], chunk, B.shape[3])
    B, C = (_grouped(t, shape).squeeze(3).contiguous() for t in (B, C))
    x, dt = _grouped(x, shape), _grouped(dt, shape)
    x_dt = torch.mul(x, dt, out=x.new_empty(x.shape))  # in this order in memory too
    decay = dt.squeeze(-1) * A.view(-1, x.shape[3], 1)
    # Powers of two, for torch's exp is several times slower on CPUs, and slower still where the result underflows.
    total = decay.double().mul_(1 / math.log(2)).cumsum(-1)
    to_end = (total[..., -1:] - total).to(x.dtype).exp2()
    return _Block(x, dt, x_dt, B, C, total, total.to(x.dtype).exp2(), to_end, (C @ B.mT).unsqueeze(3))


def _differentiate(p: _Block, grad: Tensor, states: Tensor | None, across: Tensor | None, grad_state: Tensor | None):
    """Gradients of a block: of x·dt, of A·dt (double), of B and C, and of the state before it.

    `states` (B, c + 1, G, N, R·P) before every chunk and after the last, and what they give before their decay
    (B, c, G, Q, R·P), None where there is one chunk in all; `grad_state` the gradient of the last state, None for zero.
    """
    decay, against = _decay(p.total, grad.dtype), grad @ p.x_dt.mT
    weights = decay * p.scores
    grad_x = weights.mT @ grad
    # With respect to a_j: what lies in rows i ≥ j and columns k < j of weights ⊙ grad_weights. As row sums minus column
    # sums it would nearly cancel where the decay is strong, and what is left of rounding is multiplied by dt, or by A.
    ones = decay.new_ones(decay.shape[-2:])
    grad_decay = (weights.mul_(against) @ ones.triu(1)).tril_().sum(-2).double()
    grad_scores = decay.mul_(against).sum(3)  # (B, c, G, Q, Q)
    grad_B, grad_C = grad_scores.mT @ p.C, grad_scores @ p.B
    if states is not None:
        before, last = states[:, :-1], p.from_start[..., -1]  # (B, c, G, N, R·P), (B, c, G, R)
        grad_across = _side_by_side(grad, p.from_start)  # (B, c, G, Q, R·P)
        of_rows = _by_head(grad_across * across, grad.shape).sum(-1)
        grad_total = of_rows.transpose(3, 4).double()
        grad_C += grad_across @ before.mT
        grad_states, grad_state = _carry_back(p.C.mT @ grad_across, last, grad_state)  # of what each chunk adds
        grad_B += _side_by_side(p.x_dt, p.to_end) @ grad_states.mT
        grad_added = _apart(p.B @ grad_states, grad.shape)
        through_end = ((p.x_dt * grad_added).sum(-1) * p.to_end).double()
        grad_total -= through_end
        of_last = _by_head((grad_states * before).sum(-2), grad.shape).sum(-1) * last
        grad_total[..., -1] += through_end.sum(-1) + of_last
        grad_decay += grad_total.flip(-1).cumsum(-1).flip(-1)
        grad_x.addcmul_(grad_added, p.to_end[..., None])
    return grad_x, grad_decay, grad_B, grad_C, grad_state


def _carry(added: Tensor, last: Tensor, state: Tensor | None) -> Tensor:
    """The state before every chunk and after the last, (B, c + 1, G, N, R·P).

    From what each chunk adds (B, c, G, N, R·P), each chunk's decay (B, c, G, R) and the state before (None: zero).
    """
    batch, chunks, *rest = added.shape
    states = added.new_empty(batch, chunks + 1, *rest)
    states[:, 0] = 0 if state is None else state
    by_head, added = (t.unflatten(-1, (last.shape[-1], -1)) for t in (states, added))
    last = last[:, :, :, None, :, None]
    for i in range(chunks):
        torch.addcmul(added[:, i], by_head[:, i], last[:, i], out=by_head[:, i + 1])
    return states


def _carry_back(of_before: Tensor, last: Tensor, after: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the states after every chunk (B, c, G, N, R·P), and of the one before the first.

    From their direct gradients as states before a chunk, and the gradient of the state after the last (None: zero).
    """
    states = torch.empty_like(of_before)
    states[:, -1] = 0 if after is None else after
    by_head, of_before = (t.unflatten(-1, (last.shape[-1], -1)) for t in (states, of_before))
    last = last[:, :, :, None, :, None]
    for i in range(states.shape[1] - 1, 0, -1):
        torch.addcmul(of_before[:, i], by_head[:, i], last[:, i], out=by_head[:, i - 1])
    return states, torch.addcmul(of_before[:, 0], by_head[:, 0], last[:, 0]).flatten(-2)


def _decay(total: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(total_i − total_j) for j ≤ i, else 0; total (..., Q) → (..., Q, Q).

    The difference of two sums is taken in two parts of the working precision, so that a strong decay early in the
    chunk does not eat the digits of the weak ones after it.
    """
    coarse = total.to(dtype)
    fine = (total - coarse).to(dtype)
    difference = coarse[..., :, None] - coarse[..., None, :]
    difference += fine[..., :, None]
    difference -= fine[..., None, :]
    return difference.exp2_().tril_()


def _empty(t: Tensor, chunk: int) -> Tensor:
    """Memory for something of the shape of t (B, L, ...), up to a multiple of `chunk` positions."""
    return t.new_empty(t.shape[0], t.shape[1] + -t.shape[1] % chunk, *t.shape[2:])


def _padded(t: Tensor, chunk: int) -> Tensor:
    """(B, L, ...) with zeros at the end, up to a multiple of `chunk` positions."""
    padding = -t.shape[1] % chunk
    return F.pad(t, (0, 0, 0, 0, 0, padding)) if padding else t


def _grouped(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, c·Q, G·R, ...) → (B, c, G, R, Q, ...), a view; `shape` begins with (B, c, G, Q)."""
    _, chunks, groups, chunk, *_ = shape
    return t.unflatten(1, (chunks, chunk)).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)


def _side_by_side(t: Tensor, scale: Tensor) -> Tensor:
    """(B, c, G, R, Q, P) times (B, c, G, R, Q) → (B, c, G, Q, R·P): the heads of a group in one matrix."""
    t, scale = t.transpose(3, 4), scale.transpose(3, 4)[..., None]
    return torch.mul(t, scale, out=t.new_empty(t.shape)).flatten(4)


def _by_head(t: Tensor, shape: torch.Size) -> Tensor:
    """(..., R·P) → (..., R, P), `shape` being (B, c, G, R, Q, P)."""
    return t.unflatten(-1, (shape[3], shape[5]))


def _apart(t: Tensor, shape: torch.Size) -> Tensor:
    """(B, c, G, Q, R·P) → (B, c, G, R, Q, P), a view."""
    return _by_head(t, shape).transpose(3, 4)
