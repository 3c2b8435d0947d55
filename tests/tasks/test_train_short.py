"""Stage train_short: what it checks before it trains."""

from types import SimpleNamespace

import pytest

from elastic_core.config import ConfigError
from elastic_core.cost.budgets import Cost
from elastic_core.search.choices import Choices
from elastic_core.search.importance.ranking import Ranking
from elastic_core.search.space import ElasticSpace
from tasks import train_short
from tests.support.models.parents import random_elastic
from tests.support.models.routed_family import CONFIG, RANKING


def test_budgets_are_checked_with_the_real_order_of_the_layers(tmp_path, monkeypatch):
    """What the check of params.yaml cannot know yet: here only one of the layers may go."""
    random_elastic(0, CONFIG).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(train_short, "RANK", tmp_path)
    space = ElasticSpace(CONFIG, Choices(depth=(5, 4)), RANKING)
    share = space.exact_cost([0] * 5 + [1]) / space.exact_cost([0] * 6)
    settings = SimpleNamespace(
        choices=Choices(depth=(5, 4)),
        budgets={"full": 1.0, "small": share},
        cost=Cost(),
        train_short=None,
        routing=None,
        seed=0,
    )
    Ranking({}, {}, RANKING).save(tmp_path / "ranking.json")
    train_short.check_budgets(settings)
    Ranking({}, {}, (1, 2, 3, 4, 0)).save(tmp_path / "ranking.json")
    with pytest.raises(ConfigError, match=r"budgets\.small: got 0\.\d+ .*, which no combination of `choices`"):
        train_short.check_budgets(settings)
