"""The state space scan of Mamba-2 (SSD): a naive recurrence and its chunked form in batched matrix products.

Shapes: B batch, L positions, H heads, P head channels, G groups, N state size, c chunks, Q positions of a chunk.
Heads [j·H/G, (j+1)·H/G) share group j's B and C.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk_size: int = 64) -> Tensor:
    """The same as `ssd_naive`, chunk by chunk: attention-like inside a chunk, a recurrence of states between chunks.

    B and C are never repeated per head: the heads of a group stand side by side in one matrix product.
    """
    batch, length, heads, channels = x.shape
    groups, heads_per_group = B.shape[2], heads // B.shape[2]
    chunk = min(chunk_size, length)
    padding = -length % chunk
    x_dt = x * dt[..., None]
    if padding:  # dt = 0 there: states pass through unchanged and the outputs are cut off below
        x_dt, B, C = (F.pad(t, (0, 0, 0, 0, 0, padding)) for t in (x_dt, B, C))
        dt = F.pad(dt, (0, 0, 0, padding))
    num_chunks = (length + padding) // chunk

    def split(t: Tensor) -> Tensor:  # (B, L, G·k, ...) → (B, c, G, k, Q, ...)
        t = t.view(batch, num_chunks, chunk, groups, -1, *t.shape[3:])
        return t.permute(0, 1, 3, 4, 2, *range(5, t.dim()))

    x_dt = split(x_dt)  # (B, c, G, H/G, Q, P)
    B, C = split(B).squeeze(3), split(C).squeeze(3)  # (B, c, G, Q, N)
    # Float64: a strong decay early in the chunk must not eat the digits of the weak decays after it.
    total = split(A.double() * dt.double()).cumsum(-1)  # (B, c, G, H/G, Q)
    last = total[..., -1:]

    # Inside a chunk: y_i = Σ_{j≤i} (C_i·B_j) exp(total_i − total_j) x_j dt_j
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).to(x.dtype).masked_fill(future, -torch.inf).exp()
    y = (decay * (C @ B.transpose(-1, -2)).unsqueeze(3)) @ x_dt  # (B, c, G, H/G, Q, P)

    if num_chunks > 1:  # what every chunk hands on, and what it makes of what it was handed
        weighted = x_dt * (last - total).to(x.dtype).exp()[..., None]
        states = B.transpose(-1, -2).unsqueeze(3) @ weighted  # (B, c, G, H/G, N, P)
        carried = _carry(states, last.to(x.dtype).exp()[..., None])
        y = y + (C.unsqueeze(3) @ carried) * total.to(x.dtype).exp()[..., None]

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, length + padding, heads, channels)
    return y[:, :length] + D[:, None] * x


def _carry(states: Tensor, decay: Tensor) -> Tensor:
    """The state at the start of every chunk, from what each chunk adds. states (B, c, ...), decay (B, c, ...)."""
    state = torch.zeros_like(states[:, 0])
    carried = [state]
    for i in range(states.shape[1] - 1):
        state = decay[:, i] * state + states[:, i]
        carried.append(state)
    return torch.stack(carried, dim=1)
