"""dvc.yaml: every stage depends on the code that decides its result, and a change re-runs what it must and no more."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vl_convert
import yaml

from tasks.reporting import vega
from tasks.settings import params

pytest.importorskip("dvc")

ROOT = Path(__file__).resolve().parents[2]
DEFINITION = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = DEFINITION["stages"]
PARAMETERS = yaml.safe_load((ROOT / "params.yaml").read_text())
BUDGETS, TABLE = PARAMETERS["budgets"], PARAMETERS["cost"]["table"]
# What changes no stage's result: reading and checking parameters (their values are `params` in dvc.yaml), where and
# how work is launched, shown and kept.
NO_RESULT = {
    *(
        "tasks",
        "tasks.runtime.stop_with_dvc",
        "tasks.settings.params",
        "tasks.settings.remote_checks",
        "tasks.runtime.launch",
        "tasks.progress.display",
        "tasks.progress.tracking",
    ),
    *("tasks.runtime.exit_status", "tasks.parents.targets"),
    *(
        "elastic_core.config",
        "elastic_core.io.storage",
        "elastic_core.training.checkpoint",
        "elastic_core.io.digests",
    ),
    "elastic_core.training.diagnosis",
}
# What a stage imports and does not run: stage 1 alone has a router; a ranking is read from the artifact.
RANKING = {"elastic_core.search.importance"}
ROUTER = {"elastic_core.search.router", "elastic_core.search.selection", "elastic_core.search.space"}
FORWARD = {
    "elastic_core.model.layers",
    "elastic_core.model.slicing",
}  # a family's file has its layers too, and counts what they do
FORWARD |= {f"elastic_core.model.ops.{name}" for name in ("kernels", "activation", "norm", "ssd", "flops")}
UNUSED = {
    # How the files of a tokenizer are named, and those of a package's model, of which only the tokenizer is read.
    "prepare_data": {
        "elastic_core.model.hf",
        "elastic_core.io.tensor_files",
        "elastic_core.model.architectures",
    },
    "parent": RANKING | ROUTER | {"tasks.prepare_data"},  # its tokenizer is in artifacts/data
    "train_short": RANKING,
    "train_extended": RANKING | ROUTER,
    "extract": FORWARD,
    "report": FORWARD,
}
NOT_IMPORTED = {  # code that is read by another way
    "extract": {"elastic_core/export/modeling_elastic_nemotron_h.py.txt"},
    "report": {"tasks/reporting/report.html"},
}


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(path: Path) -> set[str]:
    """Our modules that a file imports; a name that a package only hands on stands for the module that it is from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found.add(origin(node.module, alias.name))
    return {name for name in found if name.split(".")[0] in ("tasks", "elastic_core")}


def origin(module: str, name: str) -> str:
    """Where `name`, imported from `module`, is defined: a package's `__init__` is seen through."""
    if module.split(".")[0] not in ("tasks", "elastic_core"):
        return module
    if file_of(module).name != "__init__.py":
        return module
    for node in ast.parse(file_of(module).read_text()).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            return origin(node.module, name)
    return f"{module}.{name}"


def code_of(stage: str) -> set[str]:
    """Files whose change can alter the result of `python -m tasks.<stage>`."""
    unused = NO_RESULT | UNUSED.get(stage, set())
    seen, todo = set(), {f"tasks.{stage}"}
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= imported(file_of(module)) - seen - unused
    return {str(file_of(module).relative_to(ROOT)) for module in seen} | NOT_IMPORTED.get(stage, set())


def deps_of(stage: str) -> list[str]:
    entry = STAGES[stage]
    return entry.get("do", entry)["deps"]


@pytest.mark.parametrize("stage", STAGES)
def test_stages_depend_on_their_code(stage):
    code = {name for name in code_of(stage.removesuffix("_parent").removesuffix("_untrained"))}
    listed = [name for name in deps_of(stage) if not name.startswith(("artifacts/", "${cost.table}"))]
    covered = {name for name in code if any(Path(name).is_relative_to(dep) for dep in listed)}
    assert sorted(code - covered) == []
    assert [dep for dep in listed if not any(Path(name).is_relative_to(dep) for name in covered)] == []


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
        "results": ["budget,model,parameters,loss,kl_to_parent,ms_per_token,weight_mib,cache_mib"]
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
    for entry in STAGES.values():
        entry, keys = entry.get("do", entry), BUDGETS if "foreach" in entry else [""]
        for name in {*entry["deps"], *entry["outs"]} - {"reports/plots"}:
            for path in [directory / name.replace("${key}", key) for key in keys]:
                if name.startswith(("artifacts/", "reports/")):
                    path = path if path.suffix else path / "content"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(name)
    write_results(directory, 3.0)
    git(directory, "init", "-q", "-b", "main")
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


def edit(name: str):
    return lambda directory: (directory / name).write_text((directory / name).read_text() + "\n# edited\n")


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda directory: None, set()),
        # Training reads no untrained budget; the others' models and scores stay.
        (put("untrained", {"compact": 0.55}), {"extract_untrained@compact", "evaluate_untrained@compact", "report"}),
        # What comes after train_short follows, if it gives another result: data, parent and ranking stay.
        (put("budgets", "tiny", 0.35), {"train_short", "extract@tiny", "evaluate@tiny", "report"}),
        (put("choices", "hidden_size", [128, 64]), {"train_short"}),
        (put("train_extended", "steps", 901), {"train_extended"}),
        (put("tracking", "tensorboard", "here"), set()),
        (edit("elastic_core/search/router.py"), {"train_short"}),
        (edit("tasks/evaluate.py"), {"evaluate_parent", *(f"evaluate@{name}" for name in BUDGETS)}),
        (edit("elastic_core/training/checkpoint.py"), set()),
        (edit(TABLE), {"train_short", "report"}),
    ],
)
def test_a_change_re_runs_what_it_must(finished, change, expected):
    change(finished)
    try:
        assert set(json.loads(dvc(finished, "status", "--json"))) == expected
    finally:
        git(finished, "checkout", "--", ".")


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
    assert list(STAGES) == list(params.STAGES)
