"""Workspaces: a profile runs in a copy of the sources with its own parameters and results."""

import subprocess

import pytest
import yaml

from elastic_core.config import ConfigError
from elastic_core.training.stage import Routing
from tasks.settings import merging, profiles
from tasks.settings.load import read
from tasks.settings.merging import parameters
from tasks.settings.profiles import prepare_workspace
from tasks.settings.sections import Rank
from tests.support.pipeline.checkout import write_checkout

PARAMS = """\
# What a run depends on
seed: 0
budgets:      # shares of the parent
  full: 1.0
  half: 0.5
train_short:
  steps: 600  # of stage 1
  loss: {ce_weight: 0.0, kl_weight: 1.0}
  mixture: {prose: 0.5, code: 0.5}
"""
PROFILE = """\
budgets: {full: 1.0, small: 0.3}
train_short: {steps: 10, warmup_steps: 3, loss: {ce_weight: 0.5}, mixture: {prose: 1.0}}
"""


@pytest.fixture
def root(tmp_path):
    files = {
        "params.yaml": PARAMS,
        "profiles/tiny.yaml": PROFILE,
        "profiles/big.yaml": "",
        "tasks/one.py": "one",
        "tasks/two.py": "two",
        ".dvc/config": "[core]\n",
        ".gitignore": "/.runs/\n/artifacts/\n",
        "artifacts/model": "the checkout's own",
        "dvc.lock": "the checkout's own",
        "reports/metrics.json": "the checkout's own",
    }
    root = write_checkout(tmp_path / "checkout", files)
    git(root, "add", ".")
    return root


def git(root, *arguments):
    subprocess.run(["git", *arguments], cwd=root, check=True)


def test_default_is_the_checkout_itself(root):
    assert prepare_workspace("default", root) == root and prepare_workspace(root=root) == root
    assert not (root / ".runs").exists()


def test_a_profile_gets_the_sources_and_merged_parameters(root):
    (root / "tasks" / "new.py").write_text("not yet added")
    copy = prepare_workspace("tiny", root)
    assert copy == root / ".runs" / "tiny"
    for name in ("tasks/one.py", "tasks/two.py", "tasks/new.py", "profiles/tiny.yaml", ".dvc/config"):
        assert (copy / name).read_text() == (root / name).read_text()
    assert not (copy / "artifacts").exists() and not (copy / ".runs").exists()
    assert not (copy / "dvc.lock").exists()  # results are its own
    text = (copy / "params.yaml").read_text()
    assert yaml.safe_load(text) == {
        "seed": 0,
        "budgets": {"full": 1.0, "small": 0.3},  # data: replaced whole
        "train_short": {
            "steps": 10,
            "loss": {"ce_weight": 0.5, "kl_weight": 1.0},  # parameters: merged
            "mixture": {"prose": 1.0},
            "warmup_steps": 3,
        },
    }
    assert "# What a run depends on" in text and "# of stage 1" in text
    assert (root / "params.yaml").read_text() == PARAMS
    local = (copy / ".dvc" / "config.local").read_text()
    assert "no_scm = true" in local and f"dir = {root / '.dvc' / 'cache'}" in local


def test_plots_are_drawn_by_the_page_of_the_checkout(root):
    assert "html_template" not in (prepare_workspace("tiny", root) / ".dvc" / "config.local").read_text()
    page = root / ".dvc" / "plots" / "page.html"
    page.parent.mkdir()
    page.write_text("as set-up writes it")
    assert (
        f"[plots]\nhtml_template = {page}\n" in (prepare_workspace("tiny", root) / ".dvc" / "config.local").read_text()
    )


def test_results_survive_and_sources_follow(root):
    copy = prepare_workspace("tiny", root)
    assert not (copy / "reports").exists()  # the checkout's metrics are in git
    (copy / "reports").mkdir()
    (copy / "reports" / "metrics.json").write_text("results")
    (copy / "dvc.lock").write_text("results")
    (copy / "artifacts").mkdir()
    (copy / "artifacts" / "model").write_text("results")
    (copy / "tasks" / "one.py").write_text("edited in the copy")
    (copy / "params.yaml").write_text("edited in the copy")
    untouched = (copy / "profiles" / "big.yaml").stat().st_mtime_ns
    (root / "tasks" / "two.py").unlink()
    (root / "tasks" / "three.py").write_text("three")
    (root / "profiles" / "tiny.yaml").write_text("seed: 5\n")
    assert prepare_workspace("tiny", root) == copy
    assert (copy / "dvc.lock").read_text() == (copy / "artifacts" / "model").read_text() == "results"
    assert (copy / "reports" / "metrics.json").read_text() == "results"
    assert (copy / "tasks" / "one.py").read_text() == "one" and (copy / "tasks" / "three.py").read_text() == "three"
    assert not (copy / "tasks" / "two.py").exists()
    assert yaml.safe_load((copy / "params.yaml").read_text())["seed"] == 5
    assert (copy / "profiles" / "big.yaml").stat().st_mtime_ns == untouched


def test_profiles_do_not_touch_each_other(root):
    tiny, big = prepare_workspace("tiny", root), prepare_workspace("big", root)
    assert tiny != big and (big / "params.yaml").read_text() != (tiny / "params.yaml").read_text()
    assert yaml.safe_load((big / "params.yaml").read_text()) == yaml.safe_load(PARAMS)  # an empty profile


@pytest.mark.parametrize("name", ["huge", "", "../params"])
def test_an_unknown_profile_names_the_known_ones(root, name):
    with pytest.raises(ValueError, match=r"profile: got '.*'; allowed: default, big, tiny \(files in profiles/\)"):
        prepare_workspace(name, root)
    assert not (root / ".runs").exists()


def test_overrides_and_budgets_run_in_a_directory_of_their_own(root):
    overrides = ["train_short.steps=7", "train_short.loss.ce_weight=1e-1", "train_short.new=[a, b]"]
    copy = prepare_workspace("tiny", root, overrides=overrides)
    assert copy.parent == root / ".runs" and copy.name.startswith("tiny-")
    assert prepare_workspace("tiny", root, overrides=overrides) == copy
    assert prepare_workspace("tiny", root, overrides=overrides[:2]) != copy
    section = yaml.safe_load((copy / "params.yaml").read_text())["train_short"]
    assert section["steps"] == 7 and section["loss"] == {"ce_weight": 0.1, "kl_weight": 1.0}
    assert section["new"] == ["a", "b"] and section["warmup_steps"] == 3
    assert prepare_workspace("default", root, overrides=["seed=1"]) != root
    assert (root / "params.yaml").read_text() == PARAMS


def test_other_budgets_drop_the_shares_of_the_old_ones(root):
    shares = "train_short: {budget_shares: {full: 0.4, small: 0.6}}\n"
    (root / "profiles" / "big.yaml").write_text("budgets: {full: 1.0, small: 0.3}\n" + shares)

    def read(budgets):
        return yaml.safe_load((prepare_workspace("big", root, budgets) / "params.yaml").read_text())

    renamed, resized = read({"full": 1.0, "tiny": 0.2}), read({"full": 1.0, "small": 0.2})
    assert renamed["budgets"] == {"full": 1.0, "tiny": 0.2} and "budget_shares" not in renamed["train_short"]
    assert "budget_shares" not in read({"full": 1.0, "small": 0.3, "tiny": 0.2})["train_short"]
    assert resized["budgets"]["small"] == 0.2 and resized["train_short"]["budget_shares"]["small"] == 0.6


@pytest.mark.parametrize("text", ["steps", "a.b=", "a..b=1", "=1", "a.b=[1"])
def test_an_override_that_cannot_be_read_is_refused(root, text):
    with pytest.raises(ValueError, match="override: got"):
        prepare_workspace("tiny", root, overrides=[text])
    assert not (root / ".runs").exists()


def test_the_command_line(root, monkeypatch, capsys):
    monkeypatch.setattr(profiles, "prepare_workspace", lambda name: prepare_workspace(name, root))
    monkeypatch.setattr("sys.argv", ["workspace", "tiny"])
    profiles.main()
    assert capsys.readouterr().out == f"{root / '.runs' / 'tiny'}\n"
    monkeypatch.setattr("sys.argv", ["workspace", "huge"])
    with pytest.raises(SystemExit, match=r"^error: profile: got 'huge'"):
        profiles.main()


# --- what a profile inherits -----------------------------------------------------------------------------------------


def own_profile(tmp_path, text):
    """The parameters of a profile of the committed params.yaml."""
    (tmp_path / "profiles").mkdir(exist_ok=True)
    (tmp_path / "params.yaml").write_text((merging.ROOT / "params.yaml").read_text())
    (tmp_path / "profiles" / "own.yaml").write_text(text)
    return read(parameters("own", tmp_path))


SOURCES = 'prepare_data: {sources: {a: {kind: files, path: "a/*"}, b: {kind: files, path: "b/*"}, c: {kind: recall}}}\n'


def test_a_profile_with_other_sources_mixes_them_equally_and_evaluates_what_there_is(tmp_path):
    settings = own_profile(tmp_path, SOURCES)
    stages = (settings.rank, settings.train_short, settings.train_extended, settings.parent.training)
    assert all(stage.mixture == {"a": 1.0, "b": 1.0, "c": 1.0} for stage in stages)
    assert settings.evaluate.held_out == ("a", "b")  # running text
    assert settings.evaluate.tasks == ("recall_8", "recall_16")  # of the kind of source c
    assert merging.inherited("own", tmp_path) == [
        "note: profiles/own.yaml replaces prepare_data.sources and takes over from params.yaml, which sets them for "
        "its own sources: train_short.steps 800, train_short.learning_rate 0.002, train_extended.steps 900, "
        "train_extended.learning_rate 0.0015"
    ]


def test_a_profile_may_name_mixture_tasks_and_held_out_sources(tmp_path):
    text = "rank: {mixture: {a: 0.1, c: 0.9}}\nevaluate: {held_out: [c], tasks: []}\n"
    settings = own_profile(tmp_path, SOURCES + text)
    assert settings.rank.mixture == {"a": 0.1, "c": 0.9} and settings.train_short.mixture.keys() == {"a", "b", "c"}
    assert settings.evaluate.held_out == ("c",) and settings.evaluate.tasks == ()


def test_what_overrides_set_stays_whatever_their_order():
    mixture, held_out = "train_short.mixture={a: 0.9, b: 0.1}", "evaluate.held_out=[a]"
    sources = "prepare_data.sources={a: {kind: bible}, b: {kind: sympy}}"
    family, shares = "budgets={full: 1.0, half: 0.5}", "train_extended.budget_shares={full: 0.2, half: 0.8}"
    orders = ([mixture, held_out, shares, sources, family], [sources, family, mixture, held_out, shares])
    first, second = (read(parameters(overrides=order)) for order in orders)
    assert first == second and first.train_short.mixture == {"a": 0.9, "b": 0.1}
    assert first.evaluate.held_out == ("a",) and first.train_extended.budget_shares == {"full": 0.2, "half": 0.8}


def test_a_profile_with_the_same_sources_keeps_their_mixture(tmp_path):
    text = "prepare_data: {sources: {prose: {kind: bible}, code: {kind: sympy}, chains: {kind: chains}, recall: "
    settings = own_profile(tmp_path, text + "{kind: recall}}}\n")
    assert settings.train_short.mixture == {"prose": 0.3, "code": 0.3, "chains": 0.3, "recall": 0.1}
    assert merging.inherited("own", tmp_path) == []


def test_a_profile_with_a_parent_does_not_inherit_what_is_made_for_the_default_parent(tmp_path):
    with pytest.raises(ConfigError) as caught:
        own_profile(tmp_path, "parent: {path: /models/mine}\n" + SOURCES)
    names = ("sequence_length", "batch_size", "steps", "learning_rate")
    assert caught.value.problems == [
        f"params.yaml: {stage}.{name}: missing; it has no default and must be set"
        for stage in ("train_short", "train_extended")
        for name in names
    ]
    stage = "{sequence_length: 64, batch_size: 4, steps: 10, learning_rate: 1e-4}"
    text = (
        f"parent: {{path: /models/mine}}\ntrain_short: {stage}\ntrain_extended: {stage}\nchoices: {{depth: [9, 8]}}\n"
    )
    settings = own_profile(tmp_path, text + SOURCES)
    assert settings.parent.model is settings.parent.training is None
    assert settings.choices.hidden_size is None and settings.choices.depth == (9, 8)
    assert settings.routing == Routing() and settings.rank.sequence_length == Rank().sequence_length
    assert settings.train_short.final_learning_rate == 0.1 and settings.train_short.mixture.keys() == {"a", "b", "c"}


def test_parameters_that_dvc_names_are_there_for_every_profile(tmp_path):
    own_profile(tmp_path, "parent: {path: null}\n")
    required = "{sequence_length: 64, batch_size: 4, steps: 10, learning_rate: 1e-4}"  # without a default
    text = (
        f"parent: {{path: /models/mine}}\nbudgets: {{full: 1.0}}\ntrain_short: {required}\ntrain_extended: {required}\n"
    )
    (tmp_path / "profiles" / "own.yaml").write_text(text + SOURCES)
    values = parameters("own", tmp_path)
    stages = yaml.safe_load((merging.ROOT / "dvc.yaml").read_text())["stages"].values()
    named = [name for stage in stages for name in (stage.get("do") or stage).get("params", ())]
    for name in {name for name in named if isinstance(name, str) and "$" not in name}:
        found = values
        for key in name.split("."):
            assert key in found, name
            found = found[key]


def test_what_is_not_used_is_not_checked(tmp_path):
    text = "parent: {path: /models/mine, model: {nonsense: 1}, training: 3}\n"
    stage = "{sequence_length: 64, batch_size: 4, steps: 10, learning_rate: 1e-4}"
    assert own_profile(tmp_path, f"{text}train_short: {stage}\ntrain_extended: {stage}\n").parent.path == "/models/mine"


def test_a_table_that_git_ignores_is_copied(root):
    (root / "artifacts" / "table.json").write_text("a table")
    copy = prepare_workspace("tiny", root, overrides=["cost.table=artifacts/table.json"])
    assert (copy / "artifacts" / "table.json").read_text() == "a table"


def test_a_new_table_is_found_although_the_workspace_does_not_have_it_yet(tmp_path, monkeypatch):
    settings = own_profile(tmp_path, "cost: {table: profiles/new.json}\n")
    (tmp_path / "profiles" / "new.json").write_text("a table")
    (tmp_path / ".runs" / "own").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / ".runs" / "own")
    assert read(parameters("own", tmp_path)).cost.table == str(tmp_path / "profiles" / "new.json")
    assert settings.cost.metric == "parameters"
