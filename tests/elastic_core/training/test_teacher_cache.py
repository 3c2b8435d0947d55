"""A teacher's kept logits: the loss is the KL over them and the rest, and a step with them runs no teacher."""

import contextlib
import dataclasses

import pytest
import torch

from elastic_core.config import ConfigError
from elastic_core.data.loader import IGNORED_LABEL, PackedSequences
from elastic_core.errors import UserError
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.estimate.live_bytes import TrainingSetting
from elastic_core.training.estimate.piece_memory import Pieces
from elastic_core.training.estimate.step_memory import Workload, step_peak
from elastic_core.training.loop import train
from elastic_core.training.losses import KeptLogits, distillation_loss
from elastic_core.training.stage import Loss
from elastic_core.training.teacher_cache import TeacherCache, bytes_per_token
from tests.support.forked import run_forked
from tests.support.models.parents import random_elastic
from tests.support.models.routed_family import CONFIG
from tests.support.runs import assert_same, make_run, make_stage, rows_without_time

VOCAB = CONFIG.vocab_size


def cached(data, directory, kept=8, **values):
    """The cache of a stage of the small runs, and the stage."""
    stage = make_stage(**{"teacher": "cached", "kept_logits": kept, "steps": 6, **values})
    sequences = PackedSequences(data, stage.mixture, stage.sequence_length, seed=1)
    return TeacherCache(directory, sequences, stage, VOCAB), stage


def make(cache, ranks=None):
    loads = []

    def load():
        loads.append(1)
        return random_elastic(7, CONFIG)

    cache.make(load, ranks or Ranks(), contextlib.nullcontext())
    return len(loads)


@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_the_kl_over_the_kept_tokens_and_the_rest(ce_weight, temperature):
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 5, 6).double(), torch.randn(11, 6).double()
    teacher, labels = torch.randn(3, 5, 11).double(), torch.randint(0, 11, (3, 5))
    labels[0, 2] = IGNORED_LABEL
    probs = (teacher / temperature).softmax(-1)
    top = probs.topk(4)
    rest = 1 - top.values.sum(-1, keepdim=True)
    kept = KeptLogits(top.indices, torch.cat([top.values, rest], -1).log())
    hidden.requires_grad_(), head.requires_grad_()
    loss, _, kl = distillation_loss(hidden, head, labels, kept, ce_weight, 0.7, temperature, chunk=4)
    found = torch.autograd.grad(loss, (hidden, head))
    student = (hidden @ head.T / temperature).softmax(-1)
    grouped = student.gather(-1, top.indices)
    grouped = torch.cat([grouped, 1 - grouped.sum(-1, keepdim=True)], -1)
    counted = labels != IGNORED_LABEL
    expected_kl = (kept.logprobs.exp() * (kept.logprobs - grouped.log())).sum(-1)[counted].mean()
    expected_ce = torch.nn.functional.cross_entropy((hidden @ head.T)[counted], labels[counted])
    expected = ce_weight * expected_ce + 0.7 * temperature**2 * expected_kl
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(kl, expected_kl)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (hidden, head)))


def test_the_files_hold_what_the_teacher_says(data, tmp_path):
    cache, _ = cached(data, tmp_path)
    assert make(cache) == 1 and make(cache) == 0  # the second time, the teacher is not even loaded
    model = random_elastic(7, CONFIG)
    batch = cache.data.batch(5, 3)
    with torch.no_grad():
        logprobs = model(batch.input_ids, document_ids=batch.document_ids).log_softmax(-1)
    found = cache.logits(5, 3, torch.device("cpu"))
    torch.testing.assert_close(found.logprobs[..., :-1].float(), logprobs.gather(-1, found.ids), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.logprobs.float().exp().sum(-1), torch.ones(3, 16), rtol=2e-3, atol=2e-3)
    assert found.ids.unique(dim=-1).shape == (3, 16, 8)
    files = list(tmp_path.iterdir())
    expected = len(cache.rows.pairs) * 16 * bytes_per_token(8, VOCAB)
    assert sum(path.stat().st_size for path in files) == pytest.approx(expected, rel=0.05)


def test_a_row_of_several_epochs_is_stored_once(data, tmp_path):
    short, _ = cached(data, tmp_path, steps=2)
    long, stage = cached(data, tmp_path, steps=600)
    assert len(short.rows.pairs) == 12
    assert len(long.rows.pairs) < stage.steps * stage.batch_size / 2
    pairs = long.data.rows(0, 3000)
    assert [tuple(long.rows.pairs[place]) for place in long.rows.numbers(pairs)] == pairs


def test_a_stopped_computation_goes_on_with_the_missing_files(data, tmp_path, monkeypatch):
    monkeypatch.setattr("elastic_core.training.teacher_cache.MOST_ROWS", 5)
    cache, _ = cached(data, tmp_path)
    make(cache)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8  # 36 rows, five in a file
    before = {path: path.read_bytes() for path in files}
    times = {path: path.stat().st_mtime_ns for path in files}
    files[3].unlink()
    assert cache.missing() == [3] and make(cache) == 1
    assert {path: path.read_bytes() for path in files} == before
    assert [path for path in files if path.stat().st_mtime_ns != times[path]] == [files[3]]


def on_two_ranks(ranks, data, directory):
    cache, _ = cached(data, directory)
    make(cache, ranks)
    return len(cache.missing())


def test_two_ranks_write_the_same_files(data, tmp_path, monkeypatch):
    monkeypatch.setattr("elastic_core.training.teacher_cache.MOST_ROWS", 5)
    make(cached(data, tmp_path / "one")[0])
    (tmp_path / "two").mkdir()
    assert run_forked(on_two_ranks, 2, tmp_path, data, tmp_path / "two") == 0
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_training_with_all_logits_but_one_is_training_with_the_teacher(data, tmp_path):
    """Half precision on disk is what differs."""
    cache, stage = cached(data, tmp_path / "cache", kept=VOCAB - 1)
    make(cache)
    run = make_run(data, stage, teacher=False, teacher_cache=cache, checkpoints=tmp_path / "run")
    frozen = make_run(data, dataclasses.replace(stage, teacher="frozen"))
    frozen.frozen_teacher = random_elastic(7, CONFIG)  # at an equal model, Adam would follow the noise of a loss of 0
    rows, expected = rows_without_time(train(run)), rows_without_time(train(frozen))
    for ours, theirs in zip(rows, expected, strict=True):
        for one, two in zip(ours["microbatches"], theirs["microbatches"], strict=True):
            assert one["kl"] == pytest.approx(two["kl"], rel=5e-3)
    killed = train(make_run(data, stage, teacher=False, teacher_cache=cache, checkpoints=tmp_path / "killed"))
    for _ in range(4):
        next(killed)
    killed.close()
    again = make_run(data, stage, teacher=False, teacher_cache=cache, checkpoints=tmp_path / "killed")
    assert rows_without_time(train(again)) == rows[3:]
    assert_same(dict(again.model.named_parameters()), dict(run.model.named_parameters()))


def test_a_damaged_file_is_named(data, tmp_path):
    cache, _ = cached(data, tmp_path)
    make(cache)
    cache.path(0).write_bytes(b"x" * 40)
    with pytest.raises(UserError, match=r"00000000.safetensors: cannot be read .* remove it"):
        cache.logits(0, 1, torch.device("cpu"))


def test_what_a_cache_cannot_hold_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=f"kept_logits: got {VOCAB}; allowed: below the size of the vocabulary"):
        cached(data, tmp_path, kept=VOCAB)
    with pytest.raises(ConfigError, match=r"loss.state_weight: got 1.0; allowed: 0 with teacher cached"):
        cached(data, tmp_path, loss=Loss(state_weight=1.0))
    with pytest.raises(ConfigError, match=r"loss_by_budget.small.temperature: got 2.0; allowed: that of loss \(1.0\)"):
        cached(data, tmp_path, loss_by_budget={"small": Loss(temperature=2.0)})


def test_the_plan_counts_no_teacher_in_a_step():
    pieces = Pieces(CONFIG, TrainingSetting())
    frozen, with_cache = (
        step_peak(pieces, Workload(2, 16, has_teacher=teacher, kept_logits=kept))
        for teacher, kept in ((True, 0), (False, 8))
    )
    assert with_cache.kinds["teacher"] == 0 and with_cache.total < frozen.total
    assert bytes_per_token(64, 131072) == 386 and bytes_per_token(64, 1024) == 258
