"""dvc.yaml: every stage depends on the code that decides its result, and a change re-runs what it must and no more."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# What changes no stage's result: reading and checking parameters (their values are `params` in dvc.yaml), where and
# how work is launched, shown and kept.
NO_RESULT = {
    *("tasks", "tasks.lifeline", "tasks.params", "tasks.places", "tasks.launch", "tasks.progress", "tasks.tracking"),
    *("elastic_core.config", "elastic_core.storage", "elastic_core.checkpoint", "elastic_core.digests"),
    "elastic_core.diagnosis",
}
# What a stage imports and does not run: stage 1 alone has a router; a ranking is read from the artifact.
RANKING = {"elastic_core.importance"}
ROUTER = {"elastic_core.router", "elastic_core.selection", "elastic_core.choices"}
UNUSED = {
    "prepare_data": {"elastic_core.hf"},  # how the files of a tokenizer are named
    "parent": RANKING | ROUTER | {"tasks.prepare_data"},  # its tokenizer is in artifacts/data
    "train_short": RANKING,
    "train_extended": RANKING | ROUTER,
}
NOT_IMPORTED = {  # code that is read by another way
    "extract": {"elastic_core/modeling_elastic_nemotron_h.py.txt"},
    "report": {"tasks/report.html"},
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
    listed = [name for name in deps_of(stage) if not name.startswith("artifacts/")]
    covered = {name for name in code if any(Path(name).is_relative_to(dep) for dep in listed)}
    assert sorted(code - covered) == []
    assert [dep for dep in listed if not any(Path(name).is_relative_to(dep) for name in covered)] == []
