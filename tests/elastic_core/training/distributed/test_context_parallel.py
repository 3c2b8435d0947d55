"""Workers that share a sequence compute what one worker computes alone: outputs, gradients, and whole runs."""

import dataclasses
import itertools
from contextlib import nullcontext

import pytest
import torch

from benchmarks import memory
from elastic_core import Submodel
from elastic_core.config import ConfigError
from elastic_core.data.loader import PackedSequences
from elastic_core.model.documents import documents_of
from elastic_core.model.ops.parts import Part, PartDocuments
from elastic_core.training.distributed.context import make_part
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.placement import place
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.loop import train
from elastic_core.training.run import Run, check_part
from elastic_core.training.stage import Loss, Routing
from elastic_core.training.teacher_cache import TeacherCache
from tasks.commands.plan_stages import stage_peak
from tasks.parents.config import new_config
from tasks.settings.load import read
from tasks.settings.merging import parameters
from tests.support import distributed_cases as cases
from tests.support.forked import run_forked
from tests.support.models.parents import random_elastic, random_llama_config
from tests.support.models.routed_family import CONFIG
from tests.support.runs import measured_on_little_text

LENGTH = 16
LLAMA = random_llama_config(12)
# Starts at parts of 2 and 4 workers, inside of parts, after one position, several in a part, a document over all parts.
STARTS = {"whole rows": [[], []], "documents": [[4, 8, 9], [1, 2, 3, 13]], "few": [[8], [5]]}
SMALL_LLAMA = Submodel(8, (0, 2), 9, num_attention_heads=2)
MODELS = {
    "nemotron_h": (CONFIG, Submodel(), tuple(STARTS)),
    "uneven": (CONFIG, cases.UNEVEN, ("documents",)),
    "small": (CONFIG, Submodel(10, (0, 1, 2), 8, 2, 4, 2), ("few",)),
    "experts": (cases.EXPERTS, Submodel(), ("documents",)),
    "llama": (LLAMA, Submodel(), ("whole rows", "documents")),
    "small llama": (LLAMA, SMALL_LLAMA, ("few",)),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def document_ids(starts):
    ids = torch.zeros(len(starts), LENGTH, dtype=torch.int64)
    for row, places in zip(ids, starts, strict=True):
        for start in places:
            row[start:] += 1
    return ids


def gradients_of(config, submodel, ids, documents, weights):
    """Final hidden states, and the gradients of all parameters, in float64."""
    model = random_elastic(3, config).double()
    for block in model.model.layers:  # strong decays are easy: make states live over whole rows
        if hasattr(block, "mixer") and hasattr(block.mixer, "A_log"):
            block.mixer.A_log.data.sub_(3)
    hidden = model.hidden_states(ids, model.slice(submodel), documents)
    (hidden * weights[..., : hidden.shape[-1]]).sum().backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def every_case():
    generator = torch.Generator().manual_seed(0)
    for name, (config, submodel, kinds) in MODELS.items():
        ids = torch.randint(0, config.vocab_size, (2, LENGTH), generator=generator)
        weights = torch.randn(2, LENGTH, config.hidden_size, generator=generator, dtype=torch.float64)
        for kind in kinds:
            yield f"{name} {kind}", config, submodel, ids, document_ids(STARTS[kind]), weights


def shared(ranks, size):
    """The same on all ranks: hidden states put together, gradients summed."""
    found, part = {}, make_part(ranks, size)
    where = part.positions(LENGTH)
    for name, config, submodel, ids, documents, weights in every_case():
        own = PartDocuments(documents, torch.device("cpu"), part)
        hidden, gradients = gradients_of(config, submodel, ids[:, where], own, weights[:, where])
        hidden = torch.cat(list(part.gather(hidden)), dim=1)
        total = ranks.sum(torch.cat([grad.flatten() for grad in gradients.values()]))
        parts = total.split([grad.numel() for grad in gradients.values()])
        found[name] = hidden, {key: part.view_as(gradients[key]) for key, part in zip(gradients, parts, strict=True)}
    return found


def memory_settings():
    """Of two workers that share rows of 512 positions, and the parent's configuration."""
    values = ["compute.workers=2", "compute.execution.context_parallel=2", "train_extended.batch_size=2"]
    settings = read(parameters(overrides=[*values, "train_extended.sequence_length=512"]), "params.yaml")
    return settings, new_config(settings.parent.model, settings.prepare_data.vocab_size)


def on_two_ranks(ranks):
    settings, config = memory_settings()
    measured = memory.measured(config, settings, "train_extended", ranks)
    return {"measured": measured, "shared": shared(ranks, 2)}


def on_four_ranks(ranks, data, directory):
    """Two groups of two ranks share sequences."""
    return {"runs": runs(ranks, data, 2), "cached": with_cached_teacher(ranks, data, directory, 2, 3)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_forked(on_two_ranks, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def place_of_four(tmp_path_factory):
    return tmp_path_factory.mktemp("four")


@pytest.fixture(scope="module")
def four(data, place_of_four):
    return run_forked(on_four_ranks, 4, place_of_four, data, place_of_four)


def test_outputs_and_gradients_are_those_of_one_worker(two):
    assert_those_of_one_worker(two["shared"])


@pytest.mark.thorough
def test_four_parts_of_every_sequence(tmp_path):
    assert_those_of_one_worker(run_forked(shared, 4, tmp_path, 4))


def assert_those_of_one_worker(found):
    for name, config, submodel, ids, documents, weights in every_case():
        expected = gradients_of(config, submodel, ids, documents_of(documents, ids), weights)
        torch.testing.assert_close(found[name][0], expected[0], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        assert found[name][1].keys() == expected[1].keys(), name
        for key, value in expected[1].items():
            error = (found[name][1][key] - value).abs().max()
            assert error <= 1e-5 * value.abs().max() + 1e-8, (name, key, error)


def runs(ranks, data, size):
    """Hard and soft steps and drawn choices, with recomputation, matched states and the choice of the family."""
    execution = Execution(context_parallel=size, activation_checkpointing=size > 1)
    few = Execution(context_parallel=size, reduce_once=size > 1, offload_student=size > 1)
    hard = {"stage": {"steps": 2, "loss": Loss(1.0, 1.0, state_weight=0.5)}}
    soft = {"routed": True, "routing": Routing(share=0.5, settle_steps=100, candidates=2), "stage": {"steps": 2}}
    drawn = {"routed": True, "routing": Routing(mode="hard", share=1.0, candidates=1), "stage": {"steps": 2}}
    with measured_on_little_text():
        return {
            "hard": cases.trained(ranks, data, execution=execution, **hard),
            "soft": cases.trained(ranks, data, execution=execution, **soft),
            "drawn": cases.trained(ranks, data, execution=few, **drawn),
        }


@pytest.mark.thorough
def test_runs_are_those_of_one_worker(data, four):
    """Two groups of two ranks share sequences."""
    found, expected = four["runs"], runs(Ranks(), data, 1)
    for name in expected:
        assert_alike(found[name]["rows"], expected[name]["rows"], name)


def assert_alike(found, expected, name):
    for ours, theirs in zip(found, expected, strict=True):
        for one, two in zip(ours["microbatches"], theirs["microbatches"], strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=2e-5, abs=2e-5), (name, ours["step"])
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def with_cached_teacher(ranks, data, directory, size, steps=None):
    """The rows of a run that stops after `steps` steps (None: at its end), or goes on from there."""
    stage = {"teacher": "cached", "kept_logits": 8, "steps": 4, "checkpoint_every": 2}
    made = cases.make_stage(**{"batch_size": 12, "microbatches": 3, **stage})
    sequences = PackedSequences(data, made.mixture, made.sequence_length, seed=1)
    cache = TeacherCache(directory / "logits", sequences, made, CONFIG.vocab_size)
    cache.make(lambda: place(random_elastic(7, CONFIG), ranks, Execution(), "float32", True), ranks, nullcontext())
    execution = Execution(context_parallel=size)
    values = {"stage": stage, "teacher": False, "teacher_cache": cache, "checkpoints": directory / "run"}
    steps_of_run = train(cases.start(ranks, data, execution=execution, **values))
    rows = list(itertools.islice(steps_of_run, steps))
    steps_of_run.close()
    return rows


@pytest.mark.thorough
def test_one_worker_goes_on_with_a_cached_teacher_where_workers_shared_sequences(data, four, place_of_four, tmp_path):
    first, rest = four["cached"], with_cached_teacher(Ranks(), data, place_of_four, 1)
    assert [row["step"] for row in first + rest] == [1, 2, 3, 3, 4]
    expected = with_cached_teacher(Ranks(), data, tmp_path / "one", 1)
    assert_alike(first[:2] + rest, expected, "resumed")


def test_the_memory_of_a_part_is_predicted(two):
    predicted = stage_peak("train_extended", *memory_settings()).total
    assert predicted / two["measured"] == pytest.approx(1, abs=0.15)


def test_parts_know_their_documents():
    ids = document_ids([[4, 8, 9], [1, 2, 3, 13]])
    part = PartDocuments(ids, torch.device("cpu"), Part(2, 4, None))  # positions 8 to 11
    assert part.lengths == [1, 3, 4] and part.positions.tolist() == [[0, 0, 1, 2], [5, 6, 7, 8]]
    assert part.pieces == [(0, 0, 1, 8, 1), (0, 1, 3, 9, 3), (1, 0, 4, 3, 9)]
    assert part.continues.tolist() == [[False] * 4, [True] * 4]
    assert part.reaches_end.tolist() == [[False, True, True, True], [True] * 4]
    assert part.key_index.tolist() == [8, 9, 10, 11, *range(19, 28)]
    assert part.cumulative_key_lengths.tolist() == [0, 1, 4, 13]
    assert part.with_halo(3).lengths == [3, 1, 3, 7]


def test_what_cannot_be_shared_is_refused(data):
    with pytest.raises(ConfigError, match=r"context_parallel: got 3; allowed: divisors of the number of workers \(4\)"):
        make_part(Ranks(0, 4), 3)
    with pytest.raises(ConfigError, match=r"execution.context_parallel: got 2; allowed: a divisor of .* \(1\)"):
        Execution(context_parallel=2).check_workers(0)
    run = object.__new__(Run)
    run.ranks, run.execution = Ranks(0, 4), Execution(context_parallel=4)
    run.model = random_elastic(0, CONFIG)
    for length in (6, 8):
        run.stage = dataclasses.replace(cases.make_stage(), sequence_length=length)
        with pytest.raises(
            ConfigError, match=rf"sequence_length: got {length}; allowed: multiples of context_parallel"
        ):
            check_part(run)
