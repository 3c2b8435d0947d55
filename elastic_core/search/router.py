"""The router: from a budget to a distribution over sizes, and finally to a Submodel (eqs. 6–11)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.errors import UserError
from elastic_core.search.space import ElasticSpace

HIDDEN_WIDTH = 256  # of each network; the paper's


class Router(nn.Module):
    """One two-layer network per axis: z = W2·LeakyReLU(W1·u + b1) + b2, u the one-hot of the budget (eqs. 6, 7).

    `targets` are the budgets' costs as fractions of the parent's, largest first; a target of 1.0 is *pinned* to the
    parent's architecture. Families are nested by construction: a budget's choice index is the maximum of its own
    draw and the next larger budget's choice, so no axis of a smaller submodel exceeds a larger one's.
    """

    def __init__(self, space: ElasticSpace, targets: tuple[float, ...]):
        super().__init__()
        if list(targets) != sorted(set(targets), reverse=True) or not all(0 < target <= 1 for target in targets):
            raise UserError(f"budgets: got {list(targets)}; allowed: different fractions in (0, 1], largest first")
        self.space, self.targets = space, tuple(targets)
        outputs: dict[str, int] = {}
        for slot in space.slots:
            outputs[slot.axis] = outputs.get(slot.axis, 0) + len(slot.sizes)
        num = len(targets)
        self.networks = nn.ModuleDict(
            {
                axis: nn.Sequential(nn.Linear(num, HIDDEN_WIDTH), nn.LeakyReLU(), nn.Linear(HIDDEN_WIDTH, size))
                for axis, size in outputs.items()
            }
        )

    def logits(self, budget: Tensor) -> list[Tensor]:
        """Logits per slot, each (choices,), for a budget vector (num_budgets,): a one-hot, or a mixture of two."""
        logits = []
        for axis, network in self.networks.items():
            sizes = [len(slot.sizes) for slot in self.space.slots if slot.axis == axis]
            logits += network(budget).split(sizes)
        return logits

    def probs(
        self, index: int, temperature: float = 1.0, scale: float = 1.0, noise: torch.Generator | None = None
    ) -> list[Tensor]:
        """Distribution per slot of budget `index`: softmax((scale·z + gumbel)/temperature) (eqs. 8, 9), nested.

        Without `noise` the distribution is noise-free. The bound given by larger budgets is noise-free and detached.
        """
        if self.targets[index] == 1.0:
            return [F.one_hot(torch.tensor(0), len(slot.sizes)).float() for slot in self.space.slots]
        own = F.one_hot(torch.tensor(index), len(self.targets)).float()
        probs = []
        for logits in self.logits(own):
            gumbel = 0.0 if noise is None else -torch.empty_like(logits).exponential_(generator=noise).log()
            probs.append(((scale * logits + gumbel) / temperature).softmax(-1))
        if index == 0:
            return probs
        with torch.no_grad():
            larger = self.probs(index - 1, temperature, scale)
        return [_maximum(prob, bound) for prob, bound in zip(probs, larger, strict=True)]

    def choices(self) -> list[list[int]]:
        """The most probable choice indices of every budget, nested; one read-out, no noise."""
        with torch.no_grad():
            chosen, bound = [], [0] * len(self.space.slots)
            for index, target in enumerate(self.targets):
                if target < 1.0:
                    own = self.logits(F.one_hot(torch.tensor(index), len(self.targets)).float())
                    bound = [max(int(z.argmax()), low) for z, low in zip(own, bound, strict=True)]
                chosen.append(bound)
        return chosen


def _maximum(prob: Tensor, bound: Tensor) -> Tensor:
    """Distribution of max(i, j) for independent indices i ~ prob and j ~ bound, both (choices,)."""
    cumulative = prob.cumsum(-1) * bound.cumsum(-1)
    return torch.diff(cumulative, prepend=cumulative.new_zeros(1))


def noise_generator(seed: int, step: int, microbatch: int) -> torch.Generator:
    """The router's own noise, a function of its arguments alone: equal on every rank and after a resume."""
    state = np.random.SeedSequence([seed, step, microbatch]).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def anneal(progress: float, temperatures: tuple[float, float], scales: tuple[float, float]) -> tuple[float, float]:
    """(τ, s) at `progress` in [0, 1]: τ falls exponentially, the logit scale grows linearly."""
    progress = min(max(progress, 0.0), 1.0)
    (hot, cold), (low, high) = temperatures, scales
    return hot * math.exp(progress * math.log(cold / hot)), low + progress * (high - low)
