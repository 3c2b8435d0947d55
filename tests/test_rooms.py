"""The rules of the house: who may import whom, and each optional package in one file only."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = {"torch", "transformers", "numpy", "safetensors", "tokenizers"}
# Places behind URLs: torch itself needs fsspec; botocore and aiohttp, which s3fs brings, are asked for their errors.
STORAGE = {"elastic_core/io/filesystem.py": {"fsspec", "botocore", "aiohttp"}}
KERNELS = {"elastic_core/model/ops/kernels.py": {"mamba_ssm", "causal_conv1d"}}  # where they are installed, on a GPU
OPTIONAL = {
    "aiohttp",
    "altair",
    "botocore",
    "causal_conv1d",
    "datasets",
    "dvc",
    "fastapi",
    "fsspec",
    "gguf",
    "jinja2",
    "lm_eval",
    "mamba_ssm",
    "pandas",
    "pyarrow",
    "ray",
    "s3fs",
    "sympy",
    "tensorboard",
    "vl_convert",
    "wandb",
    "yaml",
}


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(package: str) -> list[Path]:
    paths = sorted([*(ROOT / package).rglob("*.py"), *(ROOT / package).rglob("*.py.txt")])
    assert len(paths) > 3
    return paths


def tops(path: Path) -> set[str]:
    """Packages that a file imports; torch's own module for TensorBoard stands for that package."""
    found = {name.split(".")[0] for name in imports(path)}
    return found | ({"tensorboard"} if "torch.utils.tensorboard" in imports(path) else set())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files("elastic_core"), ids=name_of)
def test_the_core_needs_little(path):
    allowed = CORE | {"elastic_core"} | sys.stdlib_module_names | (STORAGE | KERNELS).get(name_of(path), set())
    if path.name.endswith(".py.txt"):  # travels with exported models, so it knows transformers only
        allowed = (allowed | {"huggingface_hub"}) - {"elastic_core"}
    assert tops(path) <= allowed


@pytest.mark.parametrize("path", files("tasks"), ids=name_of)
def test_stages_do_not_know_their_orchestration(path):
    known = {"flows", "prefect", "dvc", "ray"} - ({"ray"} if path.name == "launch.py" else set())
    assert not tops(path) & known


@pytest.mark.parametrize("path", files("flows"), ids=name_of)
def test_flows_do_not_reach_into_the_core(path):
    assert "elastic_core" not in tops(path) and "torch" not in tops(path)


def test_optional_packages_are_imported_in_one_file_each():
    users = {}
    for package in ("elastic_core", "tasks", "flows"):
        for path in files(package):
            for name in tops(path) & OPTIONAL:
                users.setdefault(name, set()).add(name_of(path))
    assert {name: paths for name, paths in users.items() if len(paths) > 1} == {}
    assert users["lm_eval"] == {"tasks/evaluation/lm_eval_tasks.py"} and users["altair"] == {
        "tasks/reporting/charts.py"
    }
    assert users["mamba_ssm"] == users["causal_conv1d"] == {"elastic_core/model/ops/kernels.py"}
    assert users["tensorboard"] == users["wandb"] == {"tasks/progress/tracking.py"}


def reachable(start: str) -> set[str]:
    """Modules of the core that importing `start` leads to."""
    seen, todo = set(), [start]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path.is_file():
            todo += [name for name in imports(path) if name.startswith("elastic_core.")]
    return seen


def test_model_and_router_meet_in_training_only():
    assert "elastic_core.model.elastic_model" not in reachable("elastic_core.search.router")
    for module in ("router", "choices", "selection", "curriculum", "training"):
        assert f"elastic_core.{module}" not in reachable("elastic_core.model.elastic_model")
    assert {"elastic_core.model.elastic_model", "elastic_core.search.router"} <= reachable("elastic_core.training.loop")


def test_dependencies_have_no_circles_inside_the_core():
    for path in files("elastic_core"):
        if path.suffix == ".py" and path.name != "__init__.py":
            module = name_of(path).removesuffix(".py").replace("/", ".")
            for other in imports(path):
                if other.startswith("elastic_core.") and other != module:
                    assert module not in reachable(other), f"{module} and {other}"


def test_what_is_one_familys_own_is_said_in_its_file_only():
    own = re.compile(r"layers_block_type|NemotronH|Llama|Qwen|embed_tokens|norm_f\b|\bmixer|self_attn|backbone")
    for path in (ROOT / "elastic_core").rglob("*.py"):
        found = sorted(set(own.findall(path.read_text())))
        assert not found or path.parent.name == "families", path
    families = {path.stem for path in (ROOT / "elastic_core/model/architectures").glob("*.py")}
    assert families == {"__init__", "nemotron_h", "nemotron_h_ffn", "nemotron_h_mamba", "llama"}


def test_stages_are_named_alike_everywhere():
    import yaml

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    sections = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in stages:
        name = stage.removesuffix("_parent").removesuffix("_untrained")  # the same stage, of other models
        assert (ROOT / "tasks" / f"{name}.py").is_file() and name in sections, stage


def test_every_file_says_what_it_is():
    for package in ("elastic_core", "tasks", "flows"):
        for path in files(package):
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree) or path.name == "__init__.py", path
