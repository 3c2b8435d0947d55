"""The router's gradients by a GPU's way, in CPU memory: gates are leaves, and their gradients come back together."""

import pytest
import torch

from elastic_core.training import routing
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.loop import train_step
from elastic_core.training.run import named_parameters
from tests.support.cuda.runs import random_run, save_models
from tests.support.models.parents import random_config


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_the_router_gets_the_same_gradients_through_gates_on_a_gpu(tmp_path, monkeypatch, mode):
    save_models(tmp_path, random_config(1))
    rows, weights = [], []
    for is_host in (True, False):
        monkeypatch.setattr(routing, "is_host", lambda device, is_host=is_host: is_host)
        torch.manual_seed(0)
        run = random_run(tmp_path, Ranks(), mode)
        rows.append([train_step(run)["microbatches"] for _ in range(2)])
        weights.append({name: parameter.detach().clone() for name, parameter in named_parameters(run)})
    assert rows[1][0] == rows[0][0]  # of the first step: forward passes are the same
    assert any(name.startswith("router.") for name in weights[0])
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-4, atol=1e-5)
