"""Workspaces: a profile runs in a copy of the sources with its own parameters and results."""

import subprocess

import pytest
import yaml

from tasks.settings import profiles
from tasks.settings.profiles import prepare_workspace

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
    root = tmp_path / "checkout"
    for name, text in {
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
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
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
