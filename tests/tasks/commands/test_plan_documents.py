"""`elastic plan` knows the lengths of documents once prepare_data has run, for attention does not cross their ends."""

import json

import pytest

from elastic_core.data.token_files import Manifest, Source, SplitWriter
from elastic_core.model.submodel import full_submodel
from elastic_core.training.estimate.flops import pass_flops
from tasks.commands import plan, plan_stages
from tasks.commands.plan_stages import Hardware
from tasks.settings.load import read
from tasks.settings.merging import parameters
from tests.support.pipeline.command_line import call

SOURCES = ("prose", "code", "chains", "recall")
ON_GPU = ["compute.workers=1", "compute.gpus_per_worker=1", "train_extended.precision=bfloat16"]
POSITIONS = 8  # of every document


@pytest.fixture
def workspaces(tmp_path, monkeypatch):
    """Empty workspaces; a run with overrides has one of its own."""

    def workspace_of(profile, overrides=()):
        return tmp_path / "-".join([profile, *(text.partition("=")[0] for text in overrides)])

    monkeypatch.setattr(plan, "workspace_of", workspace_of)
    return tmp_path


def write_data(workspace, sources=SOURCES):
    directory = workspace / plan.DATA
    directory.mkdir(parents=True)
    manifest = Manifest(384, 0, None, "no tokenizer", {})
    for name in sources:
        writer = SplitWriter(directory, name, "train", manifest.dtype)
        for _ in range(40):
            writer.append([[1] * POSITIONS + [0]], num_bytes=POSITIONS)
        manifest.sources[name] = Source("split", {"train": writer.close()})
    manifest.write(directory)
    return directory


def test_attention_costs_what_documents_cost(workspaces):
    """In low precision on a GPU. In the other stages all pairs of short rows are scored."""
    settings = read(parameters("smoke", overrides=ON_GPU), "smoke")
    config, source = plan.read_parent(settings)
    data = workspaces / "smoke" / plan.DATA
    unknown = plan.make_plan(settings, config, source, Hardware(), data)
    write_data(workspaces / "smoke")
    known = plan.make_plan(settings, config, source, Hardware(), data)
    assert unknown["documents"] == {"data": str(data), "unknown_because": "prepare_data has not run"}
    assert known["documents"] == {"data": str(data), "unknown_because": None}
    for name, stage in plan_stages.stages_of(settings).items():
        length, before, after = stage.sequence_length, unknown["stages"][name], known["stages"][name]
        pairs = length * POSITIONS if name == "train_extended" else length**2
        assert (before["document_length"], before["attention_pairs"]) == (None, length**2)
        assert (after["document_length"], after["attention_pairs"]) == (POSITIONS, pairs)
        teacher = pass_flops(config, length, full_submodel(config), on_gpu=True, pairs=pairs).forward
        expected = 0 if name == "parent" else teacher * stage.steps * stage.batch_size
        assert after["flops"]["teacher"] == pytest.approx(expected)
    for kind in ("student", "teacher"):
        less, most = (planned["stages"]["train_extended"]["flops"][kind] for planned in (known, unknown))
        assert less < most
    assert known["stages"]["train_short"]["flops"] == unknown["stages"]["train_short"]["flops"]


def test_the_command_says_how_it_counts_documents(workspaces):
    unknown = "documents: one per row, because prepare_data has not run; attention costs at most this\n"
    assert unknown in call("plan", "smoke")
    directory = write_data(workspaces / "smoke")
    text = call("plan", "smoke")
    assert "documents: mean length in tokens, over tokens: 8 in parent, 8 in train_short, 8 in train_ext" in text
    assert f", in {directory}\n" in text and "rows are short in parent, train_short, train_extended:" in text
    described = json.loads(call("plan", "smoke", "--json"))
    assert described["documents"]["unknown_because"] is None
    assert described["stages"]["parent"]["document_length"] == POSITIONS


def test_data_of_another_run_are_used_only_if_they_are_the_same(workspaces):
    shared = write_data(workspaces / "smoke")
    assert plan.find_data("smoke", ["train_short.steps=3"]) == shared
    for override in ("seed=3", "prepare_data.vocab_size=300", "parent.path=/nowhere"):
        assert plan.find_data("smoke", [override]) != shared
    own = write_data(plan.workspace_of("smoke", ["train_short.steps=3"]))
    assert plan.find_data("smoke", ["train_short.steps=3"]) == own


def test_data_that_do_not_fit_are_not_counted(workspaces):
    """Of other sources than the parameters name, or damaged: the plan says why, and is the upper estimate."""
    directory = write_data(workspaces / "smoke", ["prose", "verse"])
    assert f"documents: one per row, because mixture: unknown source 'code'; {directory} has" in call("plan", "smoke")
    (directory / "manifest.json").unlink()
    assert f"because {directory}: not a data directory" in call("plan", "smoke")


@pytest.mark.thorough
def test_time_limits_are_compared_with_the_least(workspaces):
    """Documents may be short, so a limit below the hours of rows that are one document is not refused."""
    name, profile = "train_extended", "nemotron-nano-12b-v2"
    settings = read(parameters(profile, overrides=[f"time_limits={{{name}: 60}}"]), profile)
    config, source = plan.read_parent(settings)
    planned = plan.make_plan(settings, config, source, Hardware(), workspaces / "nothing")
    assert planned["stages"][name]["hours"] > settings.time_limits[name]
    plan.check_time_limits(settings, config)
