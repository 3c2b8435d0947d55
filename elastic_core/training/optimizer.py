"""AdamW for what a run trains, with moments in float32 or of 8 bits. Only this file imports torchao, for the latter.

With 8 bits, a matrix needs 2 bytes per parameter and not 8. A moment is stored as codes, one byte per number, and one
scale in float32 per block. Blocks lie inside rows, so a shard of rows has whole blocks, and a checkpoint can be read by
another number of workers.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic_core.errors import UserError
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.search.router import Router
from elastic_core.training.budget_norms import BudgetNorms
from elastic_core.training.distributed.gradients import local
from elastic_core.training.distributed.placement import is_matrix
from elastic_core.training.stage import Routing, Stage

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 32  # numbers with one scale
SMALLEST_MATRIX = 4096  # numbers; the moments of smaller matrices stay in float32, as in torchao
EXTRA = "pip install --editable '.[low-bit]'"


def make_optimizer(
    model: ElasticModel, router: Router | None, norms: BudgetNorms | None, stage: Stage, routing: Routing
) -> torch.optim.Optimizer:
    """AdamW with three groups: the matrices (with weight decay), the model's other parameters with the norm gains of
    budgets, and the router.

    If no microbatch of a step runs a layer, the layer's gradients are None, not zero. So neither weight decay nor old
    momentum changes this layer. A group must not mix sharded and whole parameters: only the matrices are sharded.
    With `stage.optimizer` adamw8bit, the moments of the matrices have 8 bits.
    """
    decayed = [p for p in model.parameters() if is_matrix(p)]
    plain = [p for p in model.parameters() if not is_matrix(p)]
    plain += [] if norms is None else norms.parameters()
    groups = [
        {"params": decayed, "weight_decay": stage.weight_decay, "peak": stage.learning_rate},
        {"params": plain, "weight_decay": 0.0, "peak": stage.learning_rate},
    ]
    if router is not None:
        groups.append({"params": list(router.parameters()), "weight_decay": 0.0, "peak": routing.learning_rate})
    if stage.optimizer == "adamw8bit":
        return make_adamw8bit(groups, decayed, lr=stage.learning_rate, betas=stage.betas)
    return AdamW(groups, lr=stage.learning_rate, betas=stage.betas, fused=True)


class AdamW(torch.optim.AdamW):
    """torch's, which can tell what a checkpoint has to hold."""

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter, by name: the optimizer's own tensors, not copies.

        torch creates it at the parameter's first gradient. A checkpoint needs the state of all parameters, so this
        creates it where it is missing, with the same initial value, zero.
        """
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=local(parameter).device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
        return state


def block_size(parameter: Tensor) -> int | None:
    """The numbers per block of a matrix's moments: a divisor of its row. None if it has none that is large enough."""
    row = math.prod(parameter.shape[1:])
    found = next((size for size in range(min(LARGEST_BLOCK, row), 0, -1) if row % size == 0), 0)
    return found if found >= SMALLEST_BLOCK and parameter.numel() >= SMALLEST_MATRIX else None


def make_adamw8bit(groups: list[dict], matrices: list[nn.Parameter], **options) -> torch.optim.Optimizer:
    """AdamW for `groups`, with 8-bit moments of those `matrices` that have blocks. Raises UserError without torchao."""
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise UserError(f"optimizer: adamw8bit needs the package torchao ({error}); to install it: {EXTRA}") from None
    quantised = {id(parameter) for parameter in matrices if block_size(parameter) is not None}

    class Optimizer(AdamW8bit):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            rows = local(p)
            if id(p) not in quantised or rows.numel() == 0:
                return torch.zeros_like(p)
            return like(p, OptimState8bit.zeros(rows.shape, signed, block_size(p), rows.device, dtype=rows.dtype))

        def step(self, closure=None):
            """torchao wants rates as tensors, and compiles the update of every shape. On CPUs that is not worth it."""
            rates = [group["lr"] for group in self.param_groups]
            on_gpu = any(local(p).is_cuda for group in self.param_groups for p in group["params"])
            eager = contextlib.nullcontext() if on_gpu else torch.compiler.set_stance("force_eager")
            for group in self.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]))
            with eager:
                super().step(closure)
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

        def moments(self, p: nn.Parameter) -> dict[str, Tensor]:
            """As of `AdamW`, as tensors of a checkpoint: with the same names on every rank."""
            if not self.state[p]:
                moments = {"exp_avg": self._new_buffer(p, True), "exp_avg_sq": self._new_buffer(p, False)}
                self.state[p] = {"step": torch.tensor(0.0), **moments}
            found = {}
            for key, value in self.state[p].items():
                if key == "step" or id(p) not in quantised:
                    found[key] = value
                    continue
                rows, block = local(value), block_size(p)
                if rows.numel() == 0:  # the last of many ranks: it holds none of the rows
                    codes, scales = (rows.new_empty(0, *p.shape[1:]).to(torch.uint8), rows.new_empty(0))
                else:
                    codes, scales = rows.codes, rows.scale
                scales = scales.view(len(codes), math.prod(p.shape[1:]) // block)
                found[f"{key}.codes"] = like(p, codes)
                found[f"{key}.scales"] = like(p, scales, (p.shape[0], scales.shape[1]))
            return found

    return Optimizer(groups, **options)


def like(parameter: Tensor, rows: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """`rows` of this rank as a tensor (shape of `parameter` if None) that is sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return rows
    shape = torch.Size(shape or parameter.shape)
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    options = {"run_check": False, "shape": shape, "stride": stride}
    return DTensor.from_local(rows, parameter.device_mesh, parameter.placements, **options)
