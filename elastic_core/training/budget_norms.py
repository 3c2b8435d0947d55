"""The norm gains that every budget trains for itself (model/norm_gains.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elastic_core.model import architectures
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.norm_gains import BudgetGains, Gains, check_nested
from elastic_core.model.submodel import Submodel


class BudgetNorms(nn.Module):
    """One gain vector for every norm and every budget below the whole model; the same on every rank.

    `names` are those of the norms. `gains` has a parameter (norms, hidden) for each name in `budgets`, without meaning
    before `start`. Channels that a budget does not keep have gains too, which never change.
    """

    def __init__(self, names: list[str], hidden_size: int, budgets: list[str], device: torch.device):
        super().__init__()
        self.names, self.budgets = names, budgets
        zeros = (torch.zeros(len(names), hidden_size, device=device) for _ in budgets)
        self.gains = nn.ParameterList([nn.Parameter(gains) for gains in zeros])

    @torch.no_grad()
    def start(self, budget: str, gains: Gains) -> None:
        """Set the gains of a budget."""
        self._of(budget).copy_(torch.stack([gains[name] for name in self.names]))

    def of(self, budget: str) -> dict[str, Tensor]:
        """The gains of a budget, with gradients; empty for the whole model, which has the gains of the model itself."""
        return dict(zip(self.names, self._of(budget).unbind(), strict=True)) if budget in self.budgets else {}

    def _of(self, budget: str) -> nn.Parameter:
        return self.gains[self.budgets.index(budget)]

    def gains_in_use(self, config, submodels: dict[str, Submodel]) -> BudgetGains:
        """The gains for a model, which follow the training. `submodels`: those of the budgets, resolved.

        Raises UserError if they are not nested.
        """
        submodels = {budget: submodels[budget] for budget in self.budgets}
        check_nested(config, submodels)
        return BudgetGains(
            submodels,
            {budget: {name: gain.detach() for name, gain in self.of(budget).items()} for budget in self.budgets},
        )


def make_budget_norms(model: ElasticModel, budgets: dict[str, float], device: torch.device) -> BudgetNorms | None:
    """The gains of a run's budgets (name → share of the parent), or None if `model` has no gains for submodels."""
    if model.norm_gains is None:
        return None
    names = [name for name, share in budgets.items() if share < 1.0]
    return BudgetNorms(architectures.norm_names(model.config), model.config.hidden_size, names, device)
