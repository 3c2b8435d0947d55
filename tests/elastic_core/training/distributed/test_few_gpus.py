"""What makes a model fit few GPUs changes no result: shards in CPU memory, gradients that are reduced once per step."""

from unittest import mock

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from elastic_core.config import ConfigError
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.gradients import norm_of_offloaded, whole
from elastic_core.training.estimate.live_bytes import TrainingSetting
from elastic_core.training.estimate.piece_memory import Pieces
from elastic_core.training.estimate.step_memory import FLOAT32, Workload, count_parameters, host_bytes, step_peak
from elastic_core.training.loop import train, train_step
from elastic_core.training.stage import Routing
from tests.support import distributed_cases as cases
from tests.support.forked import run_forked
from tests.support.models.routed_family import CONFIG
from tests.support.runs import assert_same

SHORT = {"steps": 3}
OFFLOADED = Execution(offload_student=True, offload_teacher=True)
ONCE = Execution(reduce_once=True, activation_checkpointing=True)
SOFT = {"routed": True, "routing": Routing(share=1.0, candidates=1)}
HARD = {"routed": True, "routing": Routing(mode="hard", share=1.0, candidates=1)}


def reductions(run):
    """The rows of a run, and how many groups of weights it reduced the gradients of."""
    reduce, count = _fsdp_param_group.foreach_reduce, []

    def counted(*args, **kwargs):
        count.append(1)
        return reduce(*args, **kwargs)

    with mock.patch.object(_fsdp_param_group, "foreach_reduce", counted):
        rows = list(train(run))
    return {**cases.outcome(run, rows), "reductions": len(count)}


def on_two_ranks(ranks, data, directory):
    found = {}
    for name, values in (("hard", {}), ("soft", SOFT), ("straight_through", HARD)):
        found[name] = reductions(cases.start(ranks, data, stage=SHORT, **values))
        found[f"{name} once"] = reductions(cases.start(ranks, data, stage=SHORT, execution=ONCE, **values))
    run = cases.start(ranks, data, stage=SHORT, execution=OFFLOADED, checkpoints=directory / "offloaded")
    found["offloaded"] = cases.outcome(run, list(train(run)))
    killed = train(cases.start(ranks, data, stage=SHORT | {"checkpoint_every": 2}, execution=OFFLOADED,
                               checkpoints=directory / "killed"))  # fmt: skip
    next(killed), next(killed), next(killed)
    killed.close()
    last = cases.start(ranks, data, stage=SHORT | {"checkpoint_every": 2}, execution=OFFLOADED,
                       checkpoints=directory / "killed")  # fmt: skip
    found["resumed"] = cases.outcome(last, list(train(last)))
    run.optimizer.step = lambda: gradients.extend(
        p.grad for p in run.model.parameters() if p.dim() == 2 and p.grad is not None
    )
    gradients = []
    train_step(run)
    found["norms"] = norm_of_offloaded(gradients), whole(torch.nn.utils.get_total_norm(gradients))
    return found


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("few")
    return run_forked(on_two_ranks, 2, directory, data, directory)


@pytest.mark.parametrize("name", ["hard", "soft", "straight_through"])
def test_gradients_are_reduced_once_per_step_and_are_the_same(pair, name):
    once, often = pair[f"{name} once"], pair[name]
    assert_alike(once, often)
    # 6 groups: five blocks, and embeddings with head. 3 steps of 3 microbatches; some budgets drop layers.
    assert once["reductions"] == 3 * 6 < often["reductions"]


def test_shards_in_cpu_memory_change_nothing(pair):
    """On CPUs offloaded shards are where they would be anyway, so this shows the code path, not another device's."""
    assert_same(pair["offloaded"]["weights"], pair["hard"]["weights"])
    assert pair["offloaded"]["rows"] == pair["hard"]["rows"]


def test_an_offloaded_run_resumes_at_the_same_bits(pair):
    assert_same(pair["resumed"]["weights"], pair["offloaded"]["weights"])
    assert pair["resumed"]["rows"] == pair["offloaded"]["rows"][2:]


def test_the_norm_of_offloaded_gradients_is_that_of_the_whole_ones(pair):
    found, expected = pair["norms"]
    torch.testing.assert_close(found, expected)
    assert found > 0


def assert_alike(found, expected):
    """The same up to the rounding of sums in another order."""
    for ours, theirs in zip(found["rows"], expected["rows"], strict=True):
        for one, two in zip(ours["microbatches"], theirs["microbatches"], strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for name, value in expected["weights"].items():
        assert (found["weights"][name] - value).abs().max() <= 3e-3 * value.abs().max(), name


def test_offloading_needs_workers():
    with pytest.raises(
        ConfigError, match=r"execution.offload_student: got True; allowed: false with compute.workers 0"
    ):
        Execution(offload_student=True).check_workers(0)
    Execution(offload_student=True).check_workers(1)


def test_the_plan_counts_what_is_offloaded_and_what_is_whole():
    matrices, rest = count_parameters(Pieces(CONFIG, TrainingSetting()).layout)
    load = Workload(1, 16, shards=4, accumulates=True)
    usual, offloaded, once = (
        Pieces(CONFIG, TrainingSetting(execution=execution, distributed=True))
        for execution in (Execution(), Execution(offload_student=True), Execution(reduce_once=True))
    )
    assert step_peak(offloaded, load).kinds["optimizer"] == 2 * FLOAT32 * rest
    assert host_bytes(offloaded, load) == 4 * FLOAT32 * matrices / 4 and host_bytes(usual, load) == 0
    less = step_peak(usual, load).total - step_peak(offloaded, load).total
    assert less == pytest.approx(4 * FLOAT32 * matrices / 4)
    more = step_peak(once, load).total - step_peak(usual, load).total
    assert more == pytest.approx(FLOAT32 * matrices * 3 / 4, rel=0.5) and more > 0
