"""The comparison of arms: its arithmetic against naive oracles, its jobs, and a tiny family from end to end."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import few_gpus, jobs, plot, schedule, tables, work
from benchmarks.evidence.arms import Arm, choose, read_arms, values_of
from benchmarks.evidence.intervals import Tokens, estimate, paired, ratio_to_sum, tokens_to_reach
from elastic_core import Submodel
from elastic_core.config import ConfigError
from elastic_core.data.loader import vocabulary_sha256
from elastic_core.data.token_files import Manifest, Source, SplitWriter
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from tests.support.models.parents import save_random_parent
from tests.support.models.routed_family import CONFIG, SIZES
from tests.support.runs import MEMBERS

SHORT = {
    **{"sequence_length": 16, "batch_size": 4, "steps": 6, "learning_rate": 3e-3, "warmup_steps": 2},
    **{"mixture": {"text": 1.0}, "budget_shares": {"full": 0.2, "medium": 0.4, "small": 0.4}},
}
EXTENDED = SHORT | {"sequence_length": 32, "steps": 4, "budget_shares": {"full": 1, "medium": 1, "small": 2}}
T_975 = {1: 12.706, 2: 4.303, 4: 2.776}  # a printed table: degrees of freedom → quantile of Student's t


# --- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3, 5])
def test_the_interval_is_students(number):
    values = np.random.default_rng(number).normal(3.5, 0.1, number)
    mean = sum(values) / number
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (number - 1))
    found = estimate(values.tolist())
    assert found.mean == pytest.approx(mean) and found.number == number
    assert found.half == pytest.approx(T_975[number - 1] * deviation / math.sqrt(number), rel=1e-3)
    assert estimate([2.0]).half is None and not estimate([2.0]).excludes_zero


def test_differences_are_paired_by_seed():
    ours, theirs = {0: 1.0, 1: 2.1, 3: 9.0}, {1: 2.0, 0: 0.5, 2: 7.0}
    found = paired(ours, theirs)
    assert found.mean == pytest.approx((0.5 + 0.1) / 2) and found.number == 2
    assert found.half == pytest.approx(T_975[1] * abs(0.5 - 0.1) / 2, rel=1e-3)  # of two: stdev / √2 = |a − b| / 2
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("goal", [3.9, 3.7, 3.65, 3.6])
def test_tokens_to_reach_a_loss_are_those_of_the_line_through_the_points(goal):
    points = [(400, 3.6), (100, 3.9), (200, 3.7)]
    found = tokens_to_reach(points, goal)
    tokens = np.geomspace(100, 400, 300_001)  # the curve at many places
    values = np.interp(np.log(tokens), np.log([100, 200, 400]), [3.9, 3.7, 3.6])
    assert found.number == pytest.approx(tokens[np.argmax(values <= goal + 1e-12)], rel=1e-4)
    assert found.bound == ("≤" if goal == 3.9 else "")


def test_tokens_outside_the_points_are_bounds():
    points = [(100, 3.9), (200, 3.7)]
    assert tokens_to_reach(points, 4.0) == Tokens(100, "≤") and tokens_to_reach(points, 3.6) == Tokens(200, ">")
    assert ratio_to_sum(300, [Tokens(100), Tokens(200)]) == Tokens(1.0)
    assert ratio_to_sum(300, [Tokens(100), Tokens(200, ">")]) == Tokens(1.0, "<")
    assert ratio_to_sum(300, [Tokens(100, "≤"), Tokens(200)]) == Tokens(1.0, "≥")
    assert ratio_to_sum(300, [Tokens(100, "≤"), Tokens(200, ">")]) is None


def group(arm, member, losses, tokens, kl=0.1):
    entry = {"target": 0.5, "submodel": {}, "tokens": tokens, "num_parameters": 1}
    entries = {seed: {**entry, "trained": {"loss": loss, "kl_to_parent": kl}} for seed, loss in losses.items()}
    return tables.Group(arm, member, entries, dict.fromkeys(losses, tokens), dict.fromkeys(losses, 1.0))


def test_a_family_costs_what_separate_training_costs_at_equal_loss():
    family, half, whole = Arm("family"), Arm("half", separate=True, tokens=0.5), Arm("whole", separate=True)
    groups = [
        *(group(family, name, {0: 3.5, 1: 3.7}, 1000) for name in ("a", "b", "full")),
        *(group(half, name, {0: 3.6, 1: 3.8}, 500) for name in ("a", "b")),
        *(group(whole, name, {0: 3.4, 1: 3.6}, 1000) for name in ("a", "b")),
    ]
    loss, kl = tables.equal_quality(groups)
    middle = math.sqrt(500 * 1000)  # half way in the logarithm
    assert loss.parts == {"a": Tokens(pytest.approx(middle)), "b": Tokens(pytest.approx(middle))}
    assert loss.ratio.number == pytest.approx(1000 / (2 * middle)) and loss.ratio.bound == ""
    assert loss.by_seed.mean == pytest.approx(1000 / (2 * middle)) and loss.by_seed.half == pytest.approx(0, abs=1e-9)
    assert kl.ratio == Tokens(1.0, "≥") and kl.by_seed is None  # equal with the fewest tokens already
    rows = {(row.arm.name, row.member): found["loss"].mean for row, found in tables.differences(groups)}
    expected = {"half": 0.1, "whole": -0.1}
    assert rows == {(name, member): pytest.approx(value) for name, value in expected.items() for member in "ab"}


def test_separate_training_with_other_parameters_is_another_comparison():
    plain = {"rank.basis": "channels"}
    groups = [group(Arm("family"), "a", {0: 3.5}, 1000)]
    for name, loss, overrides in (("own", 3.5, {}), ("plain", 3.7, plain)):
        for tokens in (500, 1000):
            arm = Arm(f"{name}-{tokens}", overrides, separate=True, tokens=tokens / 1000)
            groups.append(group(arm, "a", {0: loss - 0.3 * (tokens == 1000)}, tokens))
    found = {tuple(row.against): row for row in tables.equal_quality(groups) if row.measure == "loss"}
    assert list(found) == [("own-500", "own-1000"), ("plain-500", "plain-1000")]
    own, other = (row.ratio for row in found.values())
    assert own == Tokens(2.0, "≥") and other.number == pytest.approx(1000 / (500 * 2 ** (2 / 3)))


def test_the_chart_draws_a_comparison_that_the_table_has():
    """Separate training with the profile's parameters, or, if only others were trained, with those."""
    plain = {"rank.basis": "channels"}
    family = group(Arm("family"), "a", {0: 3.5}, 1000, kl=0.2)
    changed, own = (
        [
            group(Arm(f"{name}-{tokens}", overrides, separate=True, tokens=tokens / 1000), "a", {0: 3.6}, tokens)
            for tokens in (500, 1000)
        ]
        for name, overrides in (("plain", plain), ("own", {}))
    )
    for others, drawn in ((changed, changed), ([*changed, *own], own)):
        groups = [family, *others]
        lines, level = plot.curve_chart(groups, plot.shown_of(groups, tables.equal_quality(groups)))["layer"]
        assert lines["data"]["values"] == [{"tokens": g.total[0], "kl": 0.1, "member": "a"} for g in drawn]
        assert level["data"]["values"] == [{"kl": 0.2, "member": "a"}]


# --- arms and jobs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A profile of few steps, with data, a random parent and members, as a finished run leaves them."""
    directory = tmp_path_factory.mktemp("evidence")
    artifacts, draw = directory / "artifacts", np.random.default_rng(0)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(CONFIG.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    save_random_parent(artifacts / "parent", 0, CONFIG)
    for place in (artifacts / "parent", artifacts / "data/tokenizer"):
        tokenizer.save_pretrained(place)
    manifest, splits = Manifest(CONFIG.vocab_size, 0, 0, vocabulary_sha256(tokenizer), {}), {}
    for split in ("train", "held_out"):
        writer = SplitWriter(artifacts / "data", "text", split, manifest.dtype)
        writer.append([draw.integers(1, CONFIG.vocab_size, 600).tolist()], num_bytes=1200)
        splits[split] = writer.close()
    manifest.sources["text"] = Source("split", splits)
    manifest.write(artifacts / "data")
    (artifacts / "train_extended/model").mkdir(parents=True)
    elastic_checkpoint.write(artifacts / "train_extended/model", CONFIG, MEMBERS, [])
    write_profile(directory / "tiny.yaml", artifacts)
    return directory


def write_profile(path, artifacts):
    values = {
        "budgets": {"full": 1.0, "medium": 0.7, "small": 0.45},
        "choices": {name: list(sizes) for name, sizes in SIZES.items()} | {"hidden_size": list(range(16, 5, -1))},
        "prepare_data": {"sources": {"text": {"kind": "files", "path": "text.txt"}}},
        "parent": {"path": str(artifacts / "parent")},
        "rank": {"batches": 2, "batch_size": 2, "sequence_length": 16, "depth_batches": 1},
        "routing": {"share": 0.5, "settle_steps": 2, "candidates": 1},
        "train_short": SHORT,
        "train_extended": EXTENDED,
        "evaluate": {"held_out": ["text"], "max_tokens": 64, "sequence_length": 16, "tasks": []},
    }
    path.write_text(yaml.safe_dump(values))


def plan(place, **changes):
    artifacts = place / "artifacts"
    members = jobs.read_members(artifacts / "train_extended/model/elastic.json", artifacts / "parent")
    return dataclasses.replace(jobs.Plan(str(place / "tiny.yaml"), artifacts, members, 2, 2), **changes)


def settings_by_member(place, **arm):
    _, groups = jobs.jobs_of(plan(place), [Arm("arm", **arm)])
    return {member: jobs.settings_of(group[0]) for (_, member), group in groups.items()}


def test_the_committed_arms_can_be_read_and_name_each_other():
    arms = read_arms()
    assert {arm.against for arm in arms.values()} <= set(arms)
    assert [arm.name for arm in choose(arms, ["uniform"])] == ["heterogeneous", "uniform"]
    with pytest.raises(UserError, match="arms: got 'familie'; allowed: family, separate-equal"):
        choose(arms, ["familie"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"member": "fixed"}, "member: unknown parameter; did you mean 'members'"),
        ({"tokens": "equal"}, "tokens: got 'equal'; allowed: a share, without separate: true"),
        ({"tokens": 0}, "tokens: got 0.0; allowed: a share above 0, or equal"),
        ({"stages": ["train"]}, r"stages: got \('train',\); allowed: one or both of train_short, train_extended"),
        ({"members": "routed", "stages": ["train_extended"]}, "stages: got .* with train_short"),
        ({"separate": True, "members": "routed"}, "members: got 'routed'; allowed: fixed"),
        ([], r"got \[\]; allowed: a section"),
    ],
)
def test_a_wrong_arm_is_refused(tmp_path, content, message):
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump({"mine": content}))
    with pytest.raises(ConfigError, match=f"arms.yaml: mine.*{message}"):
        read_arms([tmp_path / "arms.yaml"])


def test_an_unknown_parameter_is_refused_before_anything_is_trained(place):
    message = "arm mine: params.yaml: rank.mesure: unknown parameter; did you mean 'measure'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        values_of(str(place / "tiny.yaml"), Arm("mine", {"rank.mesure": "projection"}))
    changes = {"train_short.budget_shares": {}, "train_extended.budget_shares": {}, "budgets.tiny": 0.3}
    message = "arm mine: params.yaml: choices.mamba_num_heads: got [4, 3]; allowed: different sizes"
    with pytest.raises(ConfigError, match=re.escape(message)):
        jobs.jobs_of(plan(place), [Arm("mine", {"choices.mamba_num_heads": [4, 3]}, members="routed")])
    message = "arm mine: budgets: got full, medium, small, tiny; allowed: those of the members"
    with pytest.raises(ConfigError, match=re.escape(message)):
        jobs.jobs_of(plan(place), [Arm("mine", changes)])


def test_members_alone_share_the_tokens_of_the_family(place):
    whole = settings_by_member(place)[""]
    total = whole.train_short.num_tokens() + whole.train_extended.num_tokens()
    parts = settings_by_member(place, separate=True, tokens="equal")
    assert set(parts) == {"medium", "small"}
    assert sum(s.train_short.num_tokens() + s.train_extended.num_tokens() for s in parts.values()) == total
    assert all(s.train_short.warmup_steps == 1 and not s.train_short.budget_shares for s in parts.values())
    assert [list(s.budgets) for s in parts.values()] == [["medium"], ["small"]]


@pytest.mark.parametrize("name", ["train_short", "train_extended"])
def test_one_stage_reads_the_tokens_of_both_and_ends_as_the_last_one(place, name):
    whole, found = settings_by_member(place)[""], settings_by_member(place, stages=(name,))[""]
    last, stage = whole.train_extended, getattr(found, name)
    total = whole.train_short.num_tokens() + last.num_tokens()
    assert stage.num_tokens() == pytest.approx(total, abs=last.num_tokens(1))
    rate = last.learning_rate * last.final_learning_rate
    assert stage.learning_rate * stage.final_learning_rate == pytest.approx(rate)


def test_equal_settings_share_a_job_and_other_settings_do_not(place):
    same = Arm("same", {"rank.measure": "output_norm", "routing.share": 0.4})  # no router, so its share does not count
    others = [Arm("other", {"rank.measure": "projection"}), Arm("rate", {"train_short.betas": [0.8, 0.9]})]
    arms = [Arm("family"), same, *others]
    rankings, groups = jobs.jobs_of(plan(place), arms)
    digests = {name: [job.digest for job in group] for (name, _), group in groups.items()}
    assert digests["family"] == digests["same"] and len({d for group in digests.values() for d in group}) == 6
    assert len(rankings) == 2 and groups["rate", ""][0].rank == groups["family", ""][0].rank


def test_missing_inputs_name_the_command_that_makes_them(tmp_path, place):
    with pytest.raises(UserError, match="data: not there; make it with `elastic run PROFILE --until parent`"):
        jobs.input_digests(tmp_path)
    with pytest.raises(UserError, match=r"elastic.json: does not exist; .* --members"):
        jobs.read_members(tmp_path / "elastic.json", place / "artifacts/parent")


# --- from end to end -------------------------------------------------------------------------------------------------


def run(place, out, *arms, seeds=2):
    """The whole command in this process; the numbers that it writes."""
    options = {
        "profile": place / "tiny.yaml",
        "artifacts": place / "artifacts",
        **{"out": out, "jobs": out / "jobs", "seeds": seeds, "router-seeds": seeds, "processes": 0},
    }
    evidence.main([text for name, value in options.items() for text in (f"--{name}", str(value))] + ["--arms", *arms])
    return json.loads((out / "evidence-tiny.json").read_text())


@pytest.mark.thorough
def test_arms_and_seeds_from_end_to_end(place, tmp_path, monkeypatch, capsys):
    found = run(place, tmp_path, "family", "separate-equal")
    groups = {(row["arm"], row["member"]): row["seeds"] for row in found["groups"]}
    alone = [("separate-equal", name) for name in ("medium", "small")]
    assert list(groups) == [*(("family", name) for name in MEMBERS), *alone]
    for (_, member), seeds in groups.items():
        assert list(seeds) == ["0", "1"] and seeds["0"]["trained"] != seeds["1"]["trained"]
        for entry in seeds.values():
            assert entry["zero_shot"] == seeds["0"]["zero_shot"] != entry["trained"]
            assert Submodel(**entry["submodel"]) == MEMBERS[member].submodel
    family = groups["family", "small"]["0"]
    assert family["tokens"] == pytest.approx(0.4 * 6 * 4 * 16 + 0.5 * 4 * 4 * 32)
    assert groups["family", "full"]["0"]["zero_shot"]["kl_to_parent"] == pytest.approx(0, abs=1e-6)
    page = (tmp_path / "evidence-tiny.md").read_text()
    assert "| separate-equal | family | small | 2 |" in page and "![Differences" in page
    assert (tmp_path / "evidence-tiny.svg").read_text().startswith("<svg")
    assert "5 of 7 jobs" in capsys.readouterr().out

    monkeypatch.setattr(work, "do", lambda directory: pytest.fail("a finished job was done again"))
    assert run(place, tmp_path, "family", "separate-equal") == found
    assert "7 jobs, 7 done before" in capsys.readouterr().out


def test_a_stopped_job_goes_on_after_its_finished_stage(place, tmp_path, monkeypatch):
    expected = run(place, tmp_path / "straight", "family", seeds=1)

    def stop(*_):
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(work.train_extended, "work", stop)
        with pytest.raises(SystemExit):
            run(place, tmp_path / "stopped", "family", seeds=1)
    assert not (tmp_path / "stopped/evidence-tiny.md").exists()
    monkeypatch.setattr(work, "train_fixed", lambda *_: pytest.fail("a finished stage was trained again"))
    assert run(place, tmp_path / "stopped", "family", seeds=1)["groups"] == expected["groups"]


@pytest.mark.thorough
def test_a_router_chooses_sizes_whose_uniform_counterparts_are_trained(place, tmp_path):
    found = run(place, tmp_path, "uniform", "only-stage-2", seeds=1)
    groups = {(row["arm"], row["member"]): row["seeds"]["0"] for row in found["groups"]}
    for name in ("medium", "small"):
        uniform, chosen = groups["uniform", name], groups["heterogeneous", name]
        assert uniform["num_parameters"] == pytest.approx(chosen["num_parameters"], rel=0.1)
        assert Submodel(**uniform["submodel"]).resolve(CONFIG).is_homogeneous
    spreads = [(row["arm"], row["member"]) for row in found["spreads"]]
    assert spreads == [("heterogeneous", "small"), ("uniform", "small")]
    alone = groups["only-stage-2", "small"]
    assert alone["trained"]["loss"] != alone["zero_shot"]["loss"]


@pytest.mark.thorough
def test_a_failed_process_is_reported_with_its_log(place, tmp_path):
    (ranking,), groups = jobs.jobs_of(plan(place), [Arm("family")])
    broken = dataclasses.replace(ranking, artifacts=str(tmp_path / "nowhere"))
    said = []
    (problem,) = schedule.run([broken, *groups["family", ""]], tmp_path, work.prepare, work.do, 2, say=said.append)
    assert re.match(r"ranking of family: ended with status 1 \(.*log.txt\): error: artifacts/parent: ", problem)
    assert said[1:] == [problem] and not list(tmp_path.glob("*.json"))  # jobs that need the ranking have not begun


# --- few GPUs --------------------------------------------------------------------------------------------------------


def test_every_arm_has_an_empty_directory_and_removes_only_that(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("years of work")
    used = []

    def run_arm(artifacts, settings, stage, directory):
        assert directory.parent == tmp_path and not list(directory.iterdir())
        (directory / "logits").write_text("many")
        used.append(directory)
        return {}

    monkeypatch.setattr(few_gpus, "run_arm", run_arm)
    monkeypatch.setattr("sys.argv", ["few_gpus", str(tmp_path), "--work", str(tmp_path)])
    few_gpus.main()
    assert len(used) == len(few_gpus.ARMS) and [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
