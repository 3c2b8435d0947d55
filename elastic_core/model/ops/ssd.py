"""The state space scan of Mamba-2 (SSD): as a naive recurrence, and in chunks with batched matrix products.

Letters in shapes: B batch, L positions, H heads, P channels per head, G groups, N state size, R = H/G heads per group,
c chunks, Q positions per chunk. Heads [j·R, (j+1)·R) share B and C of group j.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Positions per chunk. Long chunks make matrix products efficient, but the (Q, Q) matrices of decays grow with Q².
CHUNK = 64
CHUNK_OF_SMALL_STATES = 32  # for states with fewer than SMALL entries and more than one chunk: states cost little there
SMALL = 4096
CHUNK_ON_GPU = 128
# Entries of the (Q, Q) decays in memory at one time. On a CPU they have 2 MB in float32: small enough to stay in the
# cache between operations, and large enough for several threads.
BLOCK, BLOCK_ON_GPU = 2**19, 2**26
NO_STATE_PASSES = -(2.0**11)  # the exponent of a decay to 0 in every type: 2^−2048 underflows


def ssd_naive(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor | None = None
) -> Tensor:
    """h_t = exp(A·dt_t)·h_{t−1} + dt_t·B_t ⊗ x_t;  y_t = C_t·h_t + D·x_t, position by position.

    x (B, L, H, P), dt (B, L, H) after softplus and clamp, A (H,) negative, B and C (B, L, G, N), D (H,)
    → y (B, L, H, P). Where `starts` (B, L) bool is true, h_{t−1} is 0.
    """
    batch, length, heads, channels = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))  # (B, L, H, N)
    state = x.new_zeros(batch, heads, channels, B.shape[-1])
    outputs = []
    for t in range(length):
        decay = torch.exp(A * dt[:, t])[..., None, None]
        if starts is not None:
            decay = decay.masked_fill(starts[:, t, None, None, None], 0)
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
    starts: Tensor | None = None,
) -> Tensor:
    """As `ssd_naive`, in chunks: inside a chunk a product as in attention, between chunks a recurrence of states.

    `chunk` is the largest number of positions in a chunk, `block` the number of entries of the decays in memory at one
    time (None: the defaults above). To save memory, B and C are not repeated for each head, and the backward pass
    computes the (Q, Q) matrices again.
    """
    is_cpu, length = x.device.type == "cpu", x.shape[1]
    if chunk is None and is_cpu:
        chunk = CHUNK_OF_SMALL_STATES if length > CHUNK and x.shape[3] * B.shape[3] < SMALL else CHUNK
    longest = min(chunk or CHUNK_ON_GPU, length)
    chunk = -(-length // -(-length // longest))  # the same number of chunks, of equal length to reduce padding
    # Products are never in a lower precision, even if the layers use autocast. The meta device has no autocast.
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        block = block or (BLOCK if is_cpu else BLOCK_ON_GPU)
        return _Scan.apply(x, dt, A, B, C, D, chunk, block, starts)


class _Scan(torch.autograd.Function):
    """y_i = D·x_i + Σ_{j≤i} (C_i·B_j) exp(Σ_{j<k≤i} A·dt_k) dt_j·x_j, computed in blocks of sequences or chunks."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, chunk, block, starts):
        y, kept = _empty_padded(x, chunk), []
        for rows, parts in _blocks(x.shape, chunk, block):
            state = None
            for part in parts:
                at = None if starts is None else starts[rows, part]
                p = _prepare(x[rows, part], dt[rows, part], A, B[rows, part], C[rows, part], chunk, at)
                out = _decay(p.total, x.dtype).mul_(p.scores) @ p.x_dt  # (B, c, G, R, Q, P)
                if x.shape[1] > chunk:
                    # What each chunk adds to the state, (B, c, G, N, R·P), gets no name: it must not outlive the call.
                    states = _state_recurrence(
                        p.B.mT @ _scale_and_join_heads(p.x_dt, p.to_end), p.from_start[..., -1], state
                    )
                    across = p.C @ states[:, :-1]  # (B, c, G, Q, R·P): outputs from the states before the chunks
                    out.addcmul_(_split_heads(across, out.shape), p.from_start[..., None])
                    state = states[:, -1]
                    kept += [states, across]
                out.addcmul_(p.x, D.view(*out.shape[2:4], 1, 1))
                _grouped(y[rows, part], p.B.shape).copy_(out)
        ctx.save_for_backward(x, dt, A, B, C, D, *kept)
        ctx.sizes, ctx.starts = (chunk, block), starts
        return y[:, : x.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, dt, A, B, C, D, *kept = ctx.saved_tensors
        (chunk, block), starts = ctx.sizes, ctx.starts
        grads = [_empty_padded(t, chunk) for t in (x, dt[..., None], B, C)]
        grad_A, grad_D = torch.zeros_like(A, dtype=torch.float64), torch.zeros_like(D)
        for rows, parts in reversed(_blocks(x.shape, chunk, block)):
            grad_state = None
            for part in reversed(parts):
                at = None if starts is None else starts[rows, part]
                p = _prepare(x[rows, part], dt[rows, part], A, B[rows, part], C[rows, part], chunk, at)
                g = _grouped(_padded(grad[rows, part], chunk), p.B.shape).contiguous()
                across, states = (kept.pop(), kept.pop()) if kept else (None, None)
                grad_x_dt, grad_decay, grad_B, grad_C, grad_state = _block_backward(p, g, states, across, grad_state)
                out_x, out_dt, out_B, out_C = (_grouped(t[rows, part], p.B.shape) for t in grads)  # views
                D_, A_ = (t.view(*g.shape[2:4], 1, 1) for t in (D, A))
                grad_decay = grad_decay[..., None]
                out_dt.copy_((grad_x_dt * p.x).sum(-1, keepdim=True).add_(grad_decay * A_))
                out_x.copy_(grad_x_dt.mul_(p.dt).addcmul_(g, D_))
                out_B.copy_(grad_B.unsqueeze(3))
                out_C.copy_(grad_C.unsqueeze(3))
                grad_A += (grad_decay * p.dt).sum((0, 1, 4, 5)).flatten()
                grad_D += (g * p.x).sum((0, 1, 4, 5)).flatten()
        grad_x, grad_dt, grad_B, grad_C = (t[:, : x.shape[1]] for t in grads)
        return grad_x, grad_dt.squeeze(-1), grad_A.to(A.dtype), grad_B, grad_C, grad_D, None, None, None


class _Block(NamedTuple):
    """The values of a block that both passes need: inputs by group, and exponents of the decays."""

    x: Tensor  # (B, c, G, R, Q, P), a view
    dt: Tensor  # (B, c, G, R, Q, 1), a view
    x_dt: Tensor  # x · dt
    B: Tensor  # (B, c, G, Q, N)
    C: Tensor
    total: Tensor  # (B, c, G, R, Q): log2 of the decay since the start of the chunk; float64, see _decay
    from_start: Tensor  # the decay since the start of the chunk, 2^total
    to_end: Tensor  # the decay to the end of the chunk
    scores: Tensor  # (B, c, G, 1, Q, Q): C_i·B_j


def _blocks(shape: torch.Size, chunk: int, block: int) -> list[tuple[slice, list[slice]]]:
    """Divide the work into blocks: (sequences, list of their ranges of positions).

    A block has about `block` entries of decays, but at least one chunk of one sequence.
    """
    batch, length, heads, _ = shape
    size = heads * chunk * chunk  # entries of one chunk of one sequence
    num_sequences = -(-batch // min(batch, max(1, round(batch * size / block))))
    step = chunk * max(1, block // (num_sequences * size))
    parts = [slice(start, start + step) for start in range(0, length, step)]  # the last may end beyond the sequence
    return [(slice(start, start + num_sequences), parts) for start in range(0, batch, num_sequences)]


def _prepare(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int, starts: Tensor | None) -> _Block:
    # In the padding, inputs are 0 and decays are 1, so states pass through it unchanged. Its outputs and gradients are
    # dropped at the end.
    x, dt, B, C = (_padded(t, chunk) for t in (x, dt[..., None], B, C))
    shape = (x.shape[0], x.shape[1] // chunk, B.shape[2], chunk, B.shape[3])
    B, C = (_grouped(t, shape).squeeze(3).contiguous() for t in (B, C))
    x, dt = _grouped(x, shape), _grouped(dt, shape)
    x_dt = torch.mul(x, dt, out=x.new_empty(x.shape))  # contiguous; x and dt are permuted views
    decay = dt.squeeze(-1) * A.view(-1, x.shape[3], 1)
    # Powers of two instead of exp, because torch's exp is several times slower on CPUs, above all if results underflow.
    exponents = decay.double().mul_(1 / math.log(2))
    if starts is not None:
        starts = _padded(starts[..., None, None], chunk).view(shape[0], shape[1], 1, 1, chunk)
        exponents.masked_fill_(starts, NO_STATE_PASSES)
    total = exponents.cumsum(-1)
    to_end = (total[..., -1:] - total).to(x.dtype).exp2()
    return _Block(x, dt, x_dt, B, C, total, total.to(x.dtype).exp2(), to_end, (C @ B.mT).unsqueeze(3))


def _block_backward(p: _Block, grad: Tensor, states: Tensor | None, across: Tensor | None, grad_state: Tensor | None):
    """Gradients of a block, in this order: x·dt, A·dt (float64), B, C, and the state before the block.

    `states` (B, c + 1, G, N, R·P) are the states before every chunk and after the last one. `across` (B, c, G, Q, R·P)
    are their outputs before the decay. Both are None if the sequence is one chunk. `grad_state` is the gradient of the
    state after the block (None: zero).
    """
    decay, grad_weights = _decay(p.total, grad.dtype), grad @ p.x_dt.mT
    weights = decay * p.scores
    grad_x = weights.mT @ grad
    # The gradient of the exponent a_j = A·dt_j is the sum over rows i ≥ j and columns k < j of weights ⊙ grad_weights.
    # A difference of row sums and column sums would be simpler. But where the decay is strong, the two nearly cancel,
    # and the rounding error that remains is multiplied by dt or by A.
    ones = decay.new_ones(decay.shape[-2:])
    grad_decay = (weights.mul_(grad_weights) @ ones.triu(1)).tril_().sum(-2).double()
    grad_scores = decay.mul_(grad_weights).sum(3)  # (B, c, G, Q, Q)
    grad_B, grad_C = grad_scores.mT @ p.C, grad_scores @ p.B
    if states is not None:
        before, last = states[:, :-1], p.from_start[..., -1]  # (B, c, G, N, R·P), (B, c, G, R)
        grad_across = _scale_and_join_heads(grad, p.from_start)  # (B, c, G, Q, R·P)
        grad_from_start = _split_last(grad_across * across, grad.shape).sum(-1)
        grad_total = grad_from_start.transpose(3, 4).double()
        grad_C += grad_across @ before.mT
        # The gradient of a state is also the gradient of what the chunk before it adds to the state.
        grad_states, grad_state = _state_recurrence_backward(p.C.mT @ grad_across, last, grad_state)
        grad_B += _scale_and_join_heads(p.x_dt, p.to_end) @ grad_states.mT
        grad_added = _split_heads(p.B @ grad_states, grad.shape)
        grad_to_end = ((p.x_dt * grad_added).sum(-1) * p.to_end).double()
        grad_total -= grad_to_end
        grad_last = _split_last((grad_states * before).sum(-2), grad.shape).sum(-1) * last
        grad_total[..., -1] += grad_to_end.sum(-1) + grad_last
        grad_decay += grad_total.flip(-1).cumsum(-1).flip(-1)
        grad_x.addcmul_(grad_added, p.to_end[..., None])
    return grad_x, grad_decay, grad_B, grad_C, grad_state


def _state_recurrence(added: Tensor, last: Tensor, state: Tensor | None) -> Tensor:
    """The state before every chunk and after the last one, (B, c + 1, G, N, R·P).

    `added` (B, c, G, N, R·P) is what each chunk adds, `last` (B, c, G, R) the decay over each whole chunk, and `state`
    the state before the first chunk (None: zero).
    """
    batch, chunks, *rest = added.shape
    states = added.new_empty(batch, chunks + 1, *rest)
    states[:, 0] = 0 if state is None else state
    by_head, added = (t.unflatten(-1, (last.shape[-1], -1)) for t in (states, added))
    last = last[:, :, :, None, :, None]
    for i in range(chunks):
        torch.addcmul(added[:, i], by_head[:, i], last[:, i], out=by_head[:, i + 1])
    return states


def _state_recurrence_backward(direct: Tensor, last: Tensor, after: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the state after every chunk (B, c, G, N, R·P), and of the state before the first chunk.

    `direct` (B, c, G, N, R·P) is the gradient of the state before each chunk through the outputs of that chunk. `after`
    is the gradient of the state after the last chunk (None: zero).
    """
    states = torch.empty_like(direct)
    states[:, -1] = 0 if after is None else after
    by_head, direct = (t.unflatten(-1, (last.shape[-1], -1)) for t in (states, direct))
    last = last[:, :, :, None, :, None]
    for i in range(states.shape[1] - 1, 0, -1):
        torch.addcmul(direct[:, i], by_head[:, i], last[:, i], out=by_head[:, i - 1])
    return states, torch.addcmul(direct[:, 0], by_head[:, 0], last[:, 0]).flatten(-2)


def _decay(total: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(total_i − total_j) for j ≤ i, else 0; total (..., Q) in float64 → (..., Q, Q) in `dtype`.

    After a strong decay, total_i and total_j are large and their difference is small, so one subtraction in `dtype`
    would lose digits. Each is therefore split into two parts of type `dtype`, and the parts are subtracted separately.
    """
    coarse = total.to(dtype)
    fine = (total - coarse).to(dtype)
    difference = coarse[..., :, None] - coarse[..., None, :]
    difference += fine[..., :, None]
    difference -= fine[..., None, :]
    return difference.exp2_().tril_()


def _empty_padded(t: Tensor, chunk: int) -> Tensor:
    """An uninitialised tensor like t (B, L, ...), with L rounded up to a multiple of `chunk`."""
    return t.new_empty(t.shape[0], t.shape[1] + -t.shape[1] % chunk, *t.shape[2:])


def _padded(t: Tensor, chunk: int) -> Tensor:
    """t (B, L, ...) with zeros at the end, so that L is a multiple of `chunk`."""
    padding = -t.shape[1] % chunk
    return F.pad(t, (0, 0, 0, 0, 0, padding)) if padding else t


def _grouped(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, c·Q, G·R, ...) → (B, c, G, R, Q, ...), a view; `shape` begins with (B, c, G, Q)."""
    _, chunks, groups, chunk, *_ = shape
    return t.unflatten(1, (chunks, chunk)).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)


def _scale_and_join_heads(t: Tensor, scale: Tensor) -> Tensor:
    """t (B, c, G, R, Q, P) · scale (B, c, G, R, Q) → (B, c, G, Q, R·P): all heads of a group in one matrix."""
    t, scale = t.transpose(3, 4), scale.transpose(3, 4)[..., None]
    return torch.mul(t, scale, out=t.new_empty(t.shape)).flatten(4)


def _split_last(t: Tensor, shape: torch.Size) -> Tensor:
    """(..., R·P) → (..., R, P), a view; `shape` is (B, c, G, R, Q, P)."""
    return t.unflatten(-1, (shape[3], shape[5]))


def _split_heads(t: Tensor, shape: torch.Size) -> Tensor:
    """(B, c, G, Q, R·P) → (B, c, G, R, Q, P) = `shape`, a view."""
    return _split_last(t, shape).transpose(3, 4)
