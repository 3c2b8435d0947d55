"""README and docs as data, and checks of what they name: commands, options, parameters, paths and modules."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import os
import re
import shlex
import typing
from dataclasses import dataclass
from pathlib import Path

import typer
import yaml

from flows.cli.app import app
from tasks.settings import replaced
from tasks.settings.local_checks import INSTALL_PACKAGE
from tasks.settings.merging import profile_names
from tasks.settings.paths import is_hub_name
from tasks.settings.schema import Params
from tests.support.committed_params import ROOT
from tests.support.pipeline.command_line import call

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("elastic_core", "tasks", "flows")
OWN = ("elastic", "make", "python", "torchrun", "dvc", "prefect", "pip")  # commands that are checked
SYSTEM = {"cd", "cp", "export", "kubectl", "mkdir", "ray", "source", "ssh", "touch"}  # and those that are not
PLACEHOLDER = re.compile(r"\[?[A-Z][A-Z_]*\]?(=[A-Z]+)?|…")  # such as PROFILE, [DIR], NAME=BUDGET
PRODUCED = {"artifacts", "reports", "checkpoints", ".runs", ".prefect", ".venv"}  # what runs and set-up write


# --- reading Markdown ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def split_page(page: Path) -> tuple[list[Block], str]:
    """The fenced blocks of a page, and its text without them."""
    blocks, rest, opened = [], [], None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            if opened is None:
                opened = number, line[3:].strip(), []
            else:
                blocks.append(Block(name_of(page), opened[0], opened[1], "\n".join(opened[2])))
                opened = None
        else:
            (rest if opened is None else opened[2]).append(line)
    assert opened is None, f"{page}: the block of line {opened[0]} is not closed"
    return blocks, "\n".join(rest)


def blocks_of(language: str) -> list[Block]:
    return [block for page in PAGES for block in split_page(page)[0] if block.language == language]


@functools.cache
def spans(page: Path) -> list[str]:
    """Inline code of a page, outside of fenced blocks."""
    found = []
    for paragraph in split_page(page)[1].split("\n\n"):
        assert paragraph.count("`") % 2 == 0, f"{page}: odd number of backticks in {paragraph!r}"
        found += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", paragraph)]
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", split_page(page)[1], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# --- shell commands --------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The commands in shell text, each as its words, without variables before it and without redirections."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "|", ";"):
                words.append(word)
                continue
            words = words[: words.index(">")] if ">" in words else words
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                found.append([re.sub(r"^(/path/to/checkout/)?\.venv/bin/", "", words[0]), *words[1:]])
            words = []
    return found


def check_command(command: list[str], complete: bool) -> None:
    """Check a command of this project. One that is not `complete` may lack arguments and values of options."""
    name, *words = command
    if name.startswith("."):
        assert os.access(ROOT / name, os.X_OK), command
    elif name == "python3":
        assert words[:2] == ["-m", "venv"]
    elif name in CHECKS:
        CHECKS[name](words, complete)
    else:
        assert name in SYSTEM, f"unknown command {name}"


def check_elastic(words: list[str], complete: bool) -> None:
    group = typer.main.get_command(app)
    if words[0].startswith("-"):
        known = {"--help", "-h", "--install-completion"}
        assert set(words) <= known
        return
    assert words[0] in group.commands, f"elastic {words[0]}"
    command = group.commands[words[0]]
    help_text = call(words[0], "--help")
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help"}
    for word in words[1:]:
        option = word.partition("=")[0]
        assert not word.startswith("-") or option in known, f"elastic {words[0]} has no {option}"
        assert not option.startswith("--") or option in help_text
    if complete:
        context = command.make_context(words[0], list(words[1:]))  # parses, and calls nothing
        if "profile" in context.params:
            profile = context.params["profile"]
            is_parent = words[0] == "plan" and is_hub_name(profile)
            assert profile in profile_names() or PLACEHOLDER.fullmatch(profile) or is_parent
        for text in context.params.get("settings") or ():
            check_parameter(text.partition("=")[0])
        for stage in filter(None, [context.params.get("first"), context.params.get("last")]):
            assert stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def check_make(words: list[str], complete: bool) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split())
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE)) | {"SECTIONS"}
    for word in words:
        variable, is_assigned, value = word.partition("=")
        if not is_assigned:
            assert word in targets, f"make {word}"
            continue
        assert variable in variables and f"$({variable})" in makefile, word
        if variable == "PROFILE":
            assert value in profile_names() or PLACEHOLDER.fullmatch(value), word
        if variable == "TESTS":
            check_tests(value.split())
        if variable == "SECTIONS":
            assert set(value.split()) <= {path.stem for path in (ROOT / "benchmarks" / "sections").glob("*.py")}


def check_python(words: list[str], complete: bool) -> None:
    assert words[0] == "-m", words
    module, arguments = words[1], words[2:]
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"python -m {module}"
    is_package = spec.submodule_search_locations is not None
    assert not is_package or importlib.util.find_spec(f"{module}.__main__"), f"{module} has no __main__"
    if module == "tasks" and arguments and not PLACEHOLDER.fullmatch(arguments[0]):
        assert (ROOT / "tasks" / f"{arguments[0]}.py").is_file(), arguments
    if module == "tasks.settings.profiles":
        assert set(arguments) <= set(profile_names())
    if module == "pytest":
        check_tests(arguments)
    elif module.split(".")[0] in {*PACKAGES, "benchmarks"}:
        own = importlib.util.find_spec(f"{module}.__main__") if is_package else spec
        source = Path(own.origin).read_text()
        assert all(word in source for word in arguments if word.startswith("--")), arguments


def check_tests(words: list[str]) -> None:
    """Arguments of pytest: paths, and after -m a marker."""
    known = (ROOT / "pyproject.toml").read_text() + (ROOT / "tests/conftest.py").read_text()
    for before, word in zip(["", *words], words, strict=False):
        if before == "-m":
            assert re.search(rf"\b{word.removeprefix('not ')}\b", known), word
        elif not word.startswith("-"):
            assert (ROOT / word).exists(), word


def check_torchrun(words: list[str], complete: bool) -> None:
    if "-m" in words:
        check_python(words[words.index("-m") :], complete)


def check_dvc(words: list[str], complete: bool) -> None:
    from dvc.cli.parser import get_main_parser

    get_main_parser().parse_args(words)  # raises for a command or an option that DVC has not
    for word in words:
        if complete and re.fullmatch(r"\+?[a-z_]+\.[a-z_.]+=.+", word):
            check_parameter(word.removeprefix("+").partition("=")[0])


def check_prefect(words: list[str], complete: bool) -> None:
    if words[:2] != ["deployment", "run"]:
        return  # Prefect's own commands
    flow, name = words[2].split("/")
    deployments = (ROOT / "flows/dashboard/deployments.py").read_text()
    assert f'"flows/{flow}.py:{flow}": "{name}"' in deployments, words[2]
    tree = ast.parse((ROOT / "flows" / f"{flow}.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == flow)
    for option, value in zip(words[3:], [*words[4:], ""], strict=True):
        if option == "--param":
            assert value.partition("=")[0] in {argument.arg for argument in function.args.args}, value


def check_pip(words: list[str], complete: bool) -> None:
    extras, lock = (ROOT / "pyproject.toml").read_text(), (ROOT / "requirements.lock").read_text()
    for word in words:
        if word.startswith(".["):
            assert re.search(rf"^{word[2:-1]} = \[", extras, re.MULTILINE), word
        elif "==" in word:
            assert word in lock or word in INSTALL_PACKAGE, word


CHECKS = {name: globals()[f"check_{name}"] for name in OWN}


# --- parameters ------------------------------------------------------------------------------------------------------


def dataclasses_in(annotation) -> list[type]:
    """The dataclasses that a type allows, whether or not it also allows None."""
    if dataclasses.is_dataclass(annotation):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in dataclasses_in(part)]


def check_parameter(path: str) -> None:
    """A dotted name, such as train_short.steps, is a parameter; keys of mappings of names are free."""
    if path in replaced.KEYS:
        return
    kind: typing.Any = Params
    for name in path.split("."):
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            continue
        found = dataclasses_in(kind)
        if not found:
            assert kind is typing.Any, f"{path}: nothing is below a {kind}"
            return
        hints = typing.get_type_hints(found[0])
        assert name in hints, f"{path}: {found[0].__name__} has no {name}"
        kind = hints[name]


def fields_below(kind, seen: set[type]) -> set[str]:
    """The names of all fields of the dataclasses that a type leads to."""
    found = set()
    for each in dataclasses_in(kind):
        if each not in seen:
            seen.add(each)
            for name, hint in typing.get_type_hints(each).items():
                if typing.get_origin(hint) is not typing.ClassVar:
                    found |= {name} | fields_below(hint, seen)
    return found


# --- paths and modules -----------------------------------------------------------------------------------------------


def check_path(path: str) -> None:
    first = path.split("/")[0]
    if first in PRODUCED:
        if first == "artifacts" and path != "artifacts/":
            assert "/".join(path.split("/")[:2]) in (ROOT / "dvc.yaml").read_text(), path
    elif "*" in path:
        assert list(ROOT.glob(path)), path
    elif not any(PLACEHOLDER.fullmatch(part.partition(".")[0]) for part in path.split("/")[1:]):
        assert (ROOT / path).exists(), path


def looks_like_a_path(span: str) -> bool:
    if not re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", span):
        return False
    first = span.split("/")[0]
    is_known = "/" in span and (first in PRODUCED or (ROOT / first).exists())
    return is_known or span.endswith((".py", ".yaml", ".toml", ".lock"))


def check_module(name: str) -> None:
    """A dotted name is a module of this project, or a function, class or constant at the top of one."""
    module, names = name, []
    while not (file := ROOT / module.replace(".", "/")).is_dir() and not file.with_suffix(".py").is_file():
        module, _, last = module.rpartition(".")
        names.append(last)
    if names:
        assert len(names) == 1, name
        source = (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text()
        assert re.search(rf"^(def|class) {names[0]}\b|^{names[0]} =", source, re.MULTILINE), name


def rooms(package: str) -> set[str]:
    """The rooms of a package, as they stand in a listing: `data/` or `config.py`."""
    children = [path for path in (ROOT / package).iterdir() if not path.name.startswith("_")]
    return {
        f"{path.name}/" if path.is_dir() else path.name for path in children if path.is_dir() or path.suffix == ".py"
    }
