"""The router: small networks that map a budget to a distribution over the sizes of every axis (eqs. 6–11)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.errors import UserError
from elastic_core.search.space import ElasticSpace

HIDDEN_WIDTH = 256  # hidden units of each network, as in the paper


class Router(nn.Module):
    """One two-layer network per axis: z = W2·LeakyReLU(W1·u + b1) + b2, where u is the budget as a one-hot (eqs. 6, 7).

    `targets` are the costs of the budgets as fractions of the parent's cost, largest first. The budget with target 1.0
    is always the parent itself: no network decides about it.

    The chosen submodels are nested by construction. A larger choice index is a smaller size, and the index of a budget
    is the maximum of its own index and the index of the next larger budget. So no axis of a smaller submodel is larger
    than in a larger submodel.

    Raises UserError for targets that are not different fractions in (0, 1], largest first.
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
        """The logits z of every slot, each (choices,). `budget` (budgets,) is a one-hot, or a mixture of two."""
        logits = []
        for axis, network in self.networks.items():
            sizes = [len(slot.sizes) for slot in self.space.slots if slot.axis == axis]
            logits += network(budget).split(sizes)
        return logits

    def probs(
        self, index: int, temperature: float = 1.0, scale: float = 1.0, noise: torch.Generator | None = None
    ) -> list[Tensor]:
        """The distribution π of budget `index`, one vector (choices,) per slot (eqs. 8, 9).

        π = softmax((scale·z + g) / temperature), with Gumbel noise g from the generator `noise`, or g = 0 for None.
        Then π becomes the distribution of the maximum with the index of the next larger budget, so that submodels are
        nested. The larger budget's distribution has no noise and passes no gradient.
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

    def log_probs(self, index: int, bound: list[int], scale: float = 1.0) -> list[Tensor]:
        """The log-probabilities of budget `index`, one vector (choices,) per slot, without noise and gradient.

        The budget is below 1.0. `bound` is the combination of the next larger budget, which is decided. So, as in
        `probs`, these are of the maximum with it: a size that is larger than the bound's has −inf. They are float64 and
        never underflow.
        """
        own = F.one_hot(torch.tensor(index), len(self.targets)).float()
        found = []
        with torch.no_grad():
            for logits, low in zip(self.logits(own), bound, strict=True):
                log_prob = (scale * logits.double()).log_softmax(-1)
                log_prob[low] = log_prob[: low + 1].logsumexp(0)
                log_prob[:low] = -torch.inf
                found.append(log_prob)
        return found

    def entropies(self, temperature: float = 1.0, scale: float = 1.0) -> dict[str, list[float]]:
        """Axis → the entropy of each of its slots for each budget below 1.0, without noise.

        It is divided by that of equal probabilities, so it is from 0 to 1. A slot with one choice has none.
        """
        found: dict[str, list[float]] = {}
        with torch.no_grad():
            for index in [index for index, target in enumerate(self.targets) if target < 1.0]:
                for slot, prob in zip(self.space.slots, self.probs(index, temperature, scale), strict=True):
                    if len(prob) > 1:
                        entropy = torch.special.entr(prob.clamp(min=0)).sum().item() / math.log(len(prob))
                        found.setdefault(slot.axis, []).append(entropy)
        return found

    def choices(self) -> list[list[int]]:
        """The most probable combination of every budget, without noise, each nested in the one before."""
        with torch.no_grad():
            chosen, bound = [], [0] * len(self.space.slots)
            for index, target in enumerate(self.targets):
                if target < 1.0:
                    own = self.logits(F.one_hot(torch.tensor(index), len(self.targets)).float())
                    bound = [max(int(z.argmax()), low) for z, low in zip(own, bound, strict=True)]
                chosen.append(bound)
        return chosen


def _maximum(prob: Tensor, bound: Tensor) -> Tensor:
    """The distribution (choices,) of max(i, j) for independent indices i ~ prob and j ~ bound, both (choices,)."""
    cumulative = prob.cumsum(-1) * bound.cumsum(-1)
    return torch.diff(cumulative, prepend=cumulative.new_zeros(1))


def noise_generator(seed: int, step: int, microbatch: int) -> torch.Generator:
    """A generator for the router's Gumbel noise.

    It depends on the arguments only. So all ranks draw the same noise, and a resumed run draws the same noise again.
    """
    state = np.random.SeedSequence([seed, step, microbatch]).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def anneal(progress: float, temperatures: tuple[float, float], scales: tuple[float, float]) -> tuple[float, float]:
    """(temperature τ, logit scale s) at `progress` in [0, 1]. τ falls exponentially; s grows linearly.

    `temperatures` and `scales` are (first, last) values.
    """
    progress = min(max(progress, 0.0), 1.0)
    (hot, cold), (low, high) = temperatures, scales
    return hot * math.exp(progress * math.log(cold / hot)), low + progress * (high - low)
