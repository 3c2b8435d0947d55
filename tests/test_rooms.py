"""The rules of the house: the order of rooms, what each may import, and each optional package in one file only."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
# Imports go down each list: a room may import itself and the rooms before it, whichever function they stand in.
ROOMS = {
    "elastic_core": ("errors", "config", "io", "data", "model", "cost", "search", "training", "export"),
    "tasks": (
        *(
            "corpora",
            "settings",
            "parents",
            "progress",
            "runs",
            "runtime",
            "training",
            "evaluation",
            "reporting",
            "serving",
            "commands",
        ),
        *(
            "fingerprint",
            "prepare_data",
            "parent",
            "rank",
            "train_short",
            "train_extended",
            "extract",
            "evaluate",
            "report",
        ),
        "__main__",
    ),
    "flows": (
        *("process", "stages", "records", "tables", "differences", "live", "publish", "compare", "elastic"),
        *("dashboard", "cli"),
    ),
}
LARGEST_ROOM = 12
CORE = {"torch", "transformers", "numpy", "safetensors", "tokenizers"}
# torch itself needs fsspec; botocore and aiohttp, which s3fs brings, are asked for their errors.
STORAGE = {"elastic_core/io/filesystem.py": {"fsspec", "botocore", "aiohttp"}}
TEMPLATE_ERRORS = {"elastic_core/data/chat_template.py": {"jinja2"}}  # torch needs it; chat templates are its templates
CONFIG_ERRORS = {"elastic_core/model/hf.py": {"huggingface_hub"}}  # the errors of transformers' configurations
HUB = {f"elastic_core/{name}.py": {"huggingface_hub"} for name in ("export/model_card", "export/hub", "io/hub_errors")}
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
    "prometheus_client",
    "pyarrow",
    "ray",
    "s3fs",
    "sympy",
    "tensorboard",
    "torchao",
    "uvicorn",
    "vl_convert",
    "vllm",
    "wandb",
    "yaml",
}
LOW_BIT = {"elastic_core/training/optimizer.py": {"torchao"}}  # where it is installed
RAY = {"tasks/runtime/launch.py", "tasks/runtime/ray_cluster.py"}
LM_EVAL = {"tasks/evaluation/lm_eval_model.py", "tasks/evaluation/lm_eval_tasks.py"}
DVC = {"flows/process/dvc_repro.py", "tasks/runs/dvc.py"}  # to run stages, and in a stage


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text()


class Facts(NamedTuple):
    """What the tests ask of a file's syntax tree. Several tests ask the same files, and parsing takes longest."""

    imports: frozenset[str]
    docstring: str | None
    has_quoted_hints: bool


@functools.cache
def facts(path: Path) -> Facts:
    tree, found, is_quoted = ast.parse(text_of(path)), set(), False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            is_quoted |= isinstance(hint, ast.Constant) and isinstance(hint.value, str)
    return Facts(frozenset(found), ast.get_docstring(tree), is_quoted)


def imports(path: Path) -> frozenset[str]:
    """Full names of all modules that a file imports, inside functions too; `from a import b` names a and a.b."""
    return facts(path).imports


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


def room_of(path: Path) -> str:
    """The first name below the package: a folder, or a module at the top."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


@pytest.mark.parametrize("package", ROOMS)
def test_every_file_is_in_a_room(package):
    found = {room_of(path) for path in files(package)} - {"__init__"}
    assert found == set(ROOMS[package])


@pytest.mark.parametrize("package", ROOMS)
def test_imports_go_down_the_list_of_rooms(package):
    order = ROOMS[package]
    for path in files(package):
        if (own := room_of(path)) == "__init__":
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] in order:
                assert order.index(parts[1]) <= order.index(own), f"{name_of(path)} imports {name}"


def modules() -> dict[str, Path]:
    found = {}
    for package in ROOMS:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_no_two_modules_import_each_other():
    known = modules()
    graph = {
        module: {name for name in imports(path) if name in known and name != module} for module, path in known.items()
    }
    # `from package import module` names the package too; its __init__ imports nothing of the package at import time.
    graph = {module: {n for n in names if known[n].name != "__init__.py"} for module, names in graph.items()}
    done, active = set(), []

    def visit(module: str) -> None:
        assert module not in active, " → ".join([*active[active.index(module) :], module])
        if module not in done:
            active.append(module)
            for other in graph[module]:
                visit(other)
            active.pop()
            done.add(module)

    for module in graph:
        visit(module)


def test_no_import_is_for_types_only():
    for package in ROOMS:
        for path in files(package):
            assert not facts(path).has_quoted_hints and "TYPE_CHECKING" not in text_of(path), name_of(path)


@pytest.mark.parametrize("package", [*ROOMS, "tests", "benchmarks"])
def test_no_room_is_too_long_to_be_read(package):
    for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
        held = [path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
        assert len(held) <= LARGEST_ROOM, folder


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        for name in imports(path):
            assert not name.rpartition(".")[2].startswith("test_") or not name.startswith("tests"), name_of(path)


@pytest.mark.parametrize("module", ["tasks.settings.load", "tasks.settings.profiles", "flows.cli.app"])
def test_settings_and_the_command_line_start_without_torch(module):
    code = (
        f"import {module}, sys; "
        "print({'torch', 'transformers', 'ray', 'pandas', 'elastic_core.training.loop'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_stages_start_without_models_of_transformers_and_without_a_compiler():
    """Each takes about a second to import, and every stage of a run starts anew."""
    stages = ", ".join(f"tasks.{name}" for name in ("prepare_data", "parent", "rank", "train_short", "extract"))
    code = (
        f"import sys, {stages}; slow = {{'transformers.modeling_utils', 'transformers.activations', 'torch._dynamo'}}; "
        "print(slow & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("path", files("elastic_core"), ids=name_of)
def test_the_core_needs_little(path):
    allowed = (
        CORE
        | {"elastic_core"}
        | sys.stdlib_module_names
        | (STORAGE | KERNELS | LOW_BIT | CONFIG_ERRORS | HUB | TEMPLATE_ERRORS).get(name_of(path), set())
    )
    if path.name.endswith(".py.txt"):  # travels with exported models, so it knows transformers only
        allowed = (allowed | {"huggingface_hub"}) - {"elastic_core"}
    assert tops(path) <= allowed


@pytest.mark.parametrize("path", files("tasks"), ids=name_of)
def test_stages_do_not_know_their_orchestration(path):
    known = {"flows", "prefect"} | {name for name, users in (("dvc", DVC), ("ray", RAY)) if name_of(path) not in users}
    assert not tops(path) & known


@pytest.mark.parametrize("path", files("flows"), ids=name_of)
def test_flows_do_not_reach_into_the_core(path):
    core = {name for name in imports(path) if name.split(".")[0] in ("elastic_core", "torch")}
    assert core <= {"elastic_core.errors", "elastic_core.errors.UserError", "elastic_core.io.atomic"} | {
        name for name in core if name.startswith("elastic_core.io.atomic.")
    }


def test_optional_packages_are_imported_in_one_file_each():
    users = {}
    for package in ROOMS:
        for path in files(package):
            for name in tops(path) & OPTIONAL:
                users.setdefault(name, set()).add(name_of(path))
    # lm-eval's tasks and chat templates are templates of jinja2, so its errors are asked for there. lm-eval reads its
    # data with `datasets`, and parquet files and data sets are tables of pyarrow.
    templates = {"tasks/reporting/page.py", "tasks/evaluation/lm_eval_tasks.py", *TEMPLATE_ERRORS}
    several = {
        "datasets": {"tasks/corpora/hub_datasets.py", "tasks/evaluation/lm_eval_tasks.py"},
        "dvc": DVC,
        "jinja2": templates | {f"tasks/corpora/conversations/{name}.py" for name in ("jinja_templates", "rendering")},
        "lm_eval": LM_EVAL,
        "ray": RAY,
    }
    assert {name: paths for name, paths in users.items() if len(paths) > 1} == several
    assert users["altair"] == {"tasks/reporting/charts.py"}
    assert users["mamba_ssm"] == users["causal_conv1d"] == {"elastic_core/model/ops/kernels.py"}
    assert users["tensorboard"] == users["wandb"] == {"tasks/progress/tracking.py"}


def test_what_is_one_architectures_own_is_in_its_file_only():
    own = re.compile(r"layers_block_type|NemotronH|Llama|Qwen|embed_tokens|norm_f\b|\bmixer|self_attn|backbone")
    for path in (ROOT / "elastic_core").rglob("*.py"):
        found = sorted(set(own.findall(text_of(path))))
        assert not found or path.parent.name == "architectures", path
    architectures = {path.stem for path in (ROOT / "elastic_core/model/architectures").glob("*.py")}
    assert architectures == {"__init__", "nemotron_h", "nemotron_h_ffn", "nemotron_h_mamba", "llama", "rotary"}


def test_stages_are_named_alike_everywhere():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    sections = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in stages:
        name = stage.removesuffix("_parent").removesuffix("_untrained")  # the same stage, of other models
        assert (ROOT / "tasks" / f"{name}.py").is_file(), stage
        assert name in sections or name in ("fingerprint", "report"), stage  # these two have no parameters
    at_the_top = {path.stem for path in (ROOT / "tasks").glob("*.py")} - {"__init__", "__main__"}
    assert at_the_top == {stage.removesuffix("_parent").removesuffix("_untrained") for stage in stages}


def test_every_file_says_what_it_is():
    for package in (*ROOMS, "tests", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            assert facts(path).docstring or path.name == "__init__.py", path


def test_files_are_renamed_into_place_in_one_module():
    """Write-beside-then-rename exists once; what else renames is a directory's life (checkpoints, a URL's copy)."""
    renaming = {
        name_of(path)
        for package in ROOMS
        for path in files(package)
        if re.search(r"os\.(replace|rename)\(", text_of(path))
    }
    assert renaming == {
        "elastic_core/io/atomic.py",
        "elastic_core/io/directory_transfer.py",
        "elastic_core/training/checkpoint.py",
    }
