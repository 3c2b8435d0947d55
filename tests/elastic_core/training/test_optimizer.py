"""8-bit moments: close to float32 AdamW, resumed to the bit, and readable by another number of workers."""

import shutil
import sys

import pytest
import torch

from elastic_core.errors import UserError
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.estimate.live_bytes import TrainingSetting
from elastic_core.training.estimate.piece_memory import Pieces
from elastic_core.training.estimate.step_memory import FLOAT32, Workload, count_parameters, state_bytes
from elastic_core.training.loop import train
from elastic_core.training.optimizer import block_size
from elastic_core.training.run import state_tensors
from tests.support import distributed_cases as cases
from tests.support.forked import run_forked
from tests.support.models.routed_family import CONFIG
from tests.support.runs import assert_same, make_run, make_stage, rows_without_time

WIDE = CONFIG.__class__(**CONFIG.to_dict() | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128,
                                              "layers_block_type": ["mlp", "full_attention"]})  # fmt: skip
LOW = {"optimizer": "adamw8bit"}


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao", reason="the extra low-bit is not installed")


def start(ranks, data, **values):
    full = cases.Submodel().resolve(WIDE)
    stage = {"batch_size": 4, "microbatches": 1, "steps": 4, "checkpoint_every": 2, **values.pop("stage", LOW)}
    members = {"full": cases.Member(1.0, full)}
    return cases.start(ranks, data, config=WIDE, members=members, stage=stage, **values)


def alone(data, **values):
    return start(cases.Ranks(), data, **values)


def test_the_loss_is_close_to_that_of_float32_moments(torchao, data):
    low, usual = (
        [row["budgets"]["full"]["loss"] for row in train(alone(data, stage=stage | {"steps": 20}))]
        for stage in (LOW, {})
    )
    assert low[0] == usual[0] and low != usual
    assert low == pytest.approx(usual, rel=0.02)
    assert usual[-1] < 0.9 * usual[0]


def test_matrices_have_two_bytes_of_moments_per_number(torchao, data):
    run = alone(data)
    next(train(run))
    moments = {name: tensor for name, tensor in state_tensors(run).items() if ".exp_avg" in name}
    count = {name: p.numel() for name, p in run.model.named_parameters()}
    codes = [tensor for name, tensor in moments.items() if ".codes." in name]
    assert {tensor.dtype for tensor in codes} == {torch.uint8}
    large = [name for name, p in run.model.named_parameters() if p.dim() == 2 and p.numel() >= 4096]
    assert sum(tensor.numel() for tensor in codes) == 2 * sum(count[name] for name in large) > 0
    assert moments["optimizer.exp_avg.model.model.norm_f.weight"].dtype == torch.float32


def test_a_killed_run_ends_at_the_same_bits(torchao, data, tmp_path):
    straight = alone(data, checkpoints=tmp_path / "straight")
    rows = rows_without_time(train(straight))
    killed = train(alone(data, checkpoints=tmp_path / "killed"))
    next(killed), next(killed), next(killed)
    killed.close()
    again = alone(data, checkpoints=tmp_path / "killed")
    assert rows_without_time(train(again)) == rows[2:]
    assert_same(state_tensors(again), state_tensors(straight))


def on_three_ranks(ranks, data, directory):
    """Rows do not divide by three; the run goes on from a checkpoint of one process."""
    run = start(ranks, data, stage=LOW | {"batch_size": 6, "steps": 3}, checkpoints=directory)
    first = run.step
    rows = list(train(run))
    return first, cases.outcome(run, rows)


def test_other_ranks_go_on_from_a_checkpoint(torchao, data, tmp_path):
    stage = LOW | {"batch_size": 6, "steps": 3}
    one = train(alone(data, stage=stage, checkpoints=tmp_path / "run"))
    next(one), next(one), next(one)
    one.close()
    for name in list((tmp_path / "run").glob("step-00000003")):  # the checkpoint of the last step; step 2 is left
        shutil.rmtree(name)
    straight = alone(data, stage=stage)
    expected = cases.outcome(straight, list(train(straight)))
    _, found = run_forked(on_three_ranks, 3, tmp_path, data, tmp_path / "run")
    assert [row["step"] for row in found["rows"]] == [3]
    for name, value in expected["weights"].items():
        assert (found["weights"][name] - value).abs().max() <= 1e-4 * value.abs().max(), name


def test_without_the_package_the_error_says_how_to_install_it(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"optimizer: adamw8bit needs the package torchao .*\[low-bit\]"):
        make_run(data, make_stage(**LOW))


def test_blocks_are_parts_of_rows():
    sizes = {(5120, 20480): 256, (4480, 3136): 224, (64, 96): 96, (40, 97): None, (131, 97): 97, (100, 2 * 4999): None}
    assert {shape: block_size(torch.empty(shape, device="meta")) for shape in sizes} == sizes


def test_the_plan_counts_8_bit_moments():
    pieces = Pieces(WIDE, TrainingSetting(execution=Execution(), distributed=True))
    usual, low = (
        state_bytes(pieces, Workload(1, 16, shards=2, has_8bit_moments=low))["optimizer"] for low in (False, True)
    )
    matrices, rest = count_parameters(pieces.layout)
    assert usual == 2 * FLOAT32 * (matrices / 2 + rest)
    assert low < 0.5 * usual
