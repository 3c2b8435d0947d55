"""dvc.yaml: every stage depends on the code that decides its result, and a change re-runs what it must and no more."""

import ast
import compileall
import contextlib
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vl_convert
import yaml

import elastic_core
from flows.stages import ALWAYS
from tasks import fingerprint
from tasks.fingerprint import LIBRARIES
from tasks.reporting import vega
from tasks.settings import cross_checks

pytest.importorskip("dvc")

from dvc.repo import Repo

ROOT = Path(__file__).resolve().parents[2]
DEFINITION = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = DEFINITION["stages"]
PARAMETERS = yaml.safe_load((ROOT / "params.yaml").read_text())
EXTRACTS = {f"extract@{name}" for name in yaml.safe_load((ROOT / "params.yaml").read_text())["budgets"]}
EVALUATIONS = {"evaluate_parent", *(name.replace("extract", "evaluate") for name in EXTRACTS)}
EVERYTHING = {"prepare_data", "parent", "rank", "train_short", "train_extended", *EXTRACTS, *EVALUATIONS, "report"}
BUDGETS, TABLE = PARAMETERS["budgets"], PARAMETERS["cost"]["table"]
# What decides how work is started, watched and checked, and no stage's result.
NO_RESULT = ("elastic_core/errors.py", "tasks/progress", "tasks/runs", "tasks/runtime", "tasks/__init__.py")
NO_RESULT += tuple(f"tasks/settings/{name}.py" for name in ("__init__", "budgets", "load", "local_checks", "profiles"))
NO_RESULT += tuple(f"tasks/settings/{name}.py" for name in ("paths", "remote_checks", "replaced", "schema"))


SECTIONS = ROOT / "tasks/settings/sections.py"


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def imported(path: Path) -> set[Path]:
    """Our files that a file imports; a name that a package hands on lazily stands for the file that it is from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("tasks", "elastic_core"):
            for alias in node.names:
                module = elastic_core._MODULES.get(alias.name) if node.module == "elastic_core" else node.module
                submodule = file_of(f"{node.module}.{alias.name}")
                found.add(submodule if submodule.is_file() else file_of(module))
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names if alias.name.split(".")[0] in ("tasks", "elastic_core"))
            found |= {file_of(name) for name in names}
    return found


def is_in(path: Path, places: list[str] | tuple[str, ...]) -> bool:
    return any(path.relative_to(ROOT).is_relative_to(place) for place in places)


def code_of(stage: str) -> set[Path]:
    """The files that decide the result of `python -m tasks STAGE`."""
    seen, todo = {SECTIONS}, {ROOT / "tasks" / f"{stage}.py"}  # of SECTIONS, a stage uses its section's default values
    while todo:
        path = todo.pop()
        seen.add(path)
        todo |= {other for other in imported(path) - seen if not is_in(other, NO_RESULT)}
    return seen


def deps_of(stage: str) -> list[str]:
    entry = STAGES[stage]
    return entry.get("do", entry)["deps"]


@pytest.mark.parametrize("stage", [name for name in STAGES if name != ALWAYS])
def test_stages_depend_on_their_code(stage):
    code = code_of(stage.removesuffix("_parent").removesuffix("_untrained"))
    listed = [name for name in deps_of(stage) if not name.startswith(("artifacts/", "${cost.table}"))]
    assert sorted(str(path) for path in code if not is_in(path, listed)) == []
    assert [dep for dep in listed if not any(is_in(path, [dep]) for path in code)] == []
    assert not [dep for dep in listed if is_in(ROOT / dep, NO_RESULT)]


def libraries_of(stage: str) -> set[str]:
    """The libraries whose versions re-run a stage."""
    entry = STAGES[stage]
    return set(fingerprint._listed(entry.get("do", entry)))


@functools.cache
def imported_libraries(path: Path) -> set[str]:
    """The libraries that a file imports, by the name of their package where it is that of the module."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("stage", [name for name in STAGES if name not in (ALWAYS, "report")])
def test_stages_depend_on_the_libraries_of_their_code(stage):
    """A library that decides the result of one stage decides that of every stage whose code imports it.

    Two exceptions: the data do not depend on torch, whose tensors only readers of the data make, and the report
    computes little itself: it draws the results of other stages.
    """
    decide = set().union(*map(libraries_of, STAGES))
    code = code_of(stage.removesuffix("_parent").removesuffix("_untrained"))
    used = set().union(*map(imported_libraries, code - {SECTIONS}))
    assert sorted(used & decide - libraries_of(stage)) == (["torch"] if stage == "prepare_data" else [])


def dvc(directory: Path, *arguments: str) -> str:
    """What a DVC command that has to succeed says."""
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def git(directory: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True)


def write_results(directory: Path, loss: float) -> None:
    """The tables that the report writes for `dvc plots`, and its metrics."""
    tables = {
        "training": ["stage,tokens,budget,loss,kl,budget_error"]
        + [f"parent,{step}00,parent,{loss + 1 / step},," for step in range(1, 9)]
        + [f"train_short,{step}00,{name},{loss / step},0.1,0.0{step}" for name in BUDGETS for step in range(1, 9)],
        "results": ["budget,model,parameters,loss,kl_to_parent,latency_ratio,weight_mib,cache_mib"]
        + [f"{name},after stage 2,{share * 1e6},{loss},0.1,{share},4.0,0.1" for name, share in BUDGETS.items()],
        "router": ["budget,axis,layer,kept"]
        + [f"{name},{axis},{layer},{share}" for name, share in BUDGETS.items() for axis in "ab" for layer in range(3)],
        "importance": ["axis,layer,rank,importance"]
        + [f"ffn,{layer},{unit / 4},{1 / (unit + 1)}" for layer in range(2) for unit in range(5)],
    }
    (directory / "reports" / "plots").mkdir(parents=True, exist_ok=True)
    for name, lines in tables.items():
        (directory / "reports" / "plots" / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (directory / "reports" / "metrics.json").write_text(json.dumps({"small": {"loss": loss}}))


def is_path(out) -> bool:
    return isinstance(out, str)


def write_fingerprints(directory: Path) -> None:
    """What stage `fingerprint` writes, and what makes another run of it write the same."""
    (directory / "artifacts" / "inputs").mkdir(parents=True, exist_ok=True)
    for name in ("corpora", "parent", "tokenizer", "benchmarks"):
        (directory / "artifacts" / "inputs" / f"{name}.json").write_text("{}")
    with contextlib.chdir(directory):
        (directory / LIBRARIES).write_text(json.dumps(fingerprint.libraries()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A repository with this dvc.yaml, in which every stage has run as far as DVC can tell; results are made up."""
    directory = tmp_path_factory.mktemp("graph") / "checkout"
    directory.mkdir()
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if name.startswith(("tasks/", "elastic_core/", ".dvc", "dvc.yaml", "params.yaml", ".gitignore", TABLE)):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    write_fingerprints(directory)
    for entry in STAGES.values():
        entry, keys = entry.get("do", entry), BUDGETS if "foreach" in entry else [""]
        for name in {*entry.get("deps", ()), *filter(is_path, entry["outs"])} - {"reports/plots"}:
            for path in [directory / name.replace("${key}", key) for key in keys]:
                if name.startswith(("artifacts/", "reports/")):
                    path = path if path.suffix else path / "content"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(name)
    write_results(directory, 3.0)
    git(directory, "init", "-q", "-b", "main")
    write_fingerprints(directory)
    dvc(directory, "commit", "--force", "--quiet")
    git(directory, "add", ".")
    git(directory, "commit", "-qm", "results")
    return directory


def put(*path_and_value):
    *path, key, value = path_and_value

    def change(directory: Path) -> None:
        values = yaml.safe_load((directory / "params.yaml").read_text())
        section = values
        for name in path:
            section = section[name]
        section[key] = value
        (directory / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    return change


def put_json(name: str, key: str, value):
    """Another fingerprint, as stage `fingerprint` writes it when its inputs have changed."""

    def change(directory: Path) -> None:
        (directory / name).write_text(json.dumps(json.loads((directory / name).read_text()) | {key: value}))

    return change


def edit(name: str):
    return lambda directory: (directory / name).write_text((directory / name).read_text() + "\n# edited\n")


def compile_code(directory: Path) -> None:
    """What Python does where code is imported."""
    assert compileall.compile_dir(directory / "elastic_core", quiet=1)


@contextlib.contextmanager
def changed(directory: Path, *changes):
    """What `dvc status` says after some changes, without a process; afterwards the changes are undone."""
    for change in changes:
        change(directory)
    try:
        with contextlib.chdir(directory), Repo() as repo:
            yield {stage: entries for stage, entries in repo.status().items() if stage != ALWAYS}
    finally:
        git(directory, "checkout", "--", ".")
        write_fingerprints(directory)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda directory: None, set()),
        # Training reads no untrained budget; the others' models and scores stay.
        (put("untrained", {"compact": 0.55}), {"extract_untrained@compact", "evaluate_untrained@compact", "report"}),
        # What comes after train_short follows, if it gives another result: data, parent and ranking stay.
        (put("budgets", "tiny", 0.35), {"train_short", "extract@tiny", "evaluate@tiny", "report"}),
    ],
)
def test_a_change_of_the_family_re_runs_what_it_must(finished, change, expected):
    with changed(finished, change) as status:
        assert set(status) == expected


# What changes, with the stages that have to run again: code and inputs by file, libraries and parameters by key.
FILES = {
    "elastic_core/search/router.py": {"parent", "rank", "train_short", "train_extended", *EXTRACTS},
    "tasks/evaluate.py": {"evaluate_parent", *(f"evaluate@{name}" for name in BUDGETS)},
    "elastic_core/io/storage.py": EVERYTHING,
    "tasks/runtime/launch.py": set(),
    "tasks/settings/sections.py": EVERYTHING,
    "artifacts/inputs/corpora.json": {"prepare_data"},
    "artifacts/inputs/parent.json": {"parent"},
    "artifacts/inputs/tokenizer.json": {"prepare_data"},
    "artifacts/inputs/benchmarks.json": EVALUATIONS,
    TABLE: {"train_short", "report"},
}
OF_LIBRARIES = {
    "torch": EVERYTHING - {"prepare_data", "report"},
    "jinja2": EVERYTHING - {"report"},
    "tokenizers": EVERYTHING - {"report"},
    "lm_eval": EVALUATIONS,
    "mamba-ssm": {"parent", "rank", "train_short", "train_extended"},
}
OF_PARAMETERS = {"choices": {"train_short"}, "train_extended": {"train_extended"}, "tracking": set()}


def test_a_change_re_runs_what_it_must(finished):
    """All changes at once: for each stage DVC names the dependencies that have changed, and each is of one change."""
    changes = [put_json(name, "mine", {"files": 2}) if is_fingerprint(name) else edit(name) for name in FILES]
    changes += [put_json(str(LIBRARIES), name, "1.0") for name in OF_LIBRARIES]
    changes += [put("choices", "hidden_size", [128, 64]), put("train_extended", "steps", 901)]
    changes += [put("tracking", "tensorboard", "here"), compile_code]
    found = {name: set() for name in (*FILES, *OF_LIBRARIES, *OF_PARAMETERS)}
    with changed(finished, *changes) as status:
        for stage, entries in status.items():
            (entry,) = entries
            for dependency, change in entry["changed deps"].items():
                if isinstance(change, dict):  # of parameters and libraries
                    names = {key.split(".")[0] if dependency == "params.yaml" else key for key in change}
                else:
                    names = {name for name in FILES if is_in(ROOT / name, [dependency])}
                    assert len(names) == 1, f"{stage}: {dependency} has changed"
                for name in names:
                    found[name].add(stage)
    assert found == FILES | OF_LIBRARIES | OF_PARAMETERS


def is_fingerprint(name: str) -> bool:
    return name.startswith("artifacts/")


@pytest.mark.parametrize("command, revisions", [(["show"], ["workspace"]), (["diff", "main"], ["main", "workspace"])])
def test_plots_can_be_drawn(finished, command, revisions):
    """Every plot of every revision is in the picture, budget by budget: nothing but the templates decides that."""
    write_results(finished, 2.0)
    plots = json.loads(dvc(finished, "plots", *command, "--json"))
    assert not plots.get("errors") and set(plots["data"]) == {next(iter(plot)) for plot in DEFINITION["plots"]}
    for name, (plot,) in plots["data"].items():
        svg = vl_convert.vegalite_to_svg(plot["content"])
        assert sorted(plot["revisions"]) == revisions
        words = [*revisions, *BUDGETS] if name != "importance" else [*revisions, "ffn"]
        assert [word for word in words if f">{word}<" not in svg] == [], name


def test_metrics_of_two_revisions(finished):
    write_results(finished, 2.0)
    lines = dvc(finished, "metrics", "diff", "main").splitlines()
    assert [line.split() for line in lines[1:]] == [["reports/metrics.json", "small.loss", "3.0", "2.0", "-1.0"]]


def test_the_page_of_plots_loads_nothing(finished, monkeypatch):
    monkeypatch.setattr("sys.argv", ["vega", str(finished / ".dvc" / "plots" / "page.html")])
    vega.main()
    dvc(finished, "config", "--local", "plots.html_template", "plots/page.html")
    dvc(finished, "plots", "show", "router")
    html = (finished / "dvc_plots" / "index.html").read_text()
    assert "vegaEmbed('#router', spec)" in html and "window.vegaEmbed=" in html
    assert not re.search(r"""(src|href) *= *["']?(https?:)?//|@import|cdn\.|importScripts""", html)
    ignored = subprocess.run(["git", "check-ignore", ".dvc/plots/page.html", "dvc_plots"], cwd=finished)
    assert ignored.returncode == 0


def test_every_stage_can_have_a_time_limit():
    assert list(STAGES) == list(cross_checks.STAGES)
