"""Parameter files with broken values and bytes: read, or refused by one message that names the file."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from elastic_core.errors import UserError
from tasks.commands import check as commands
from tasks.runtime.preflight import check_family
from tasks.settings import load, merging
from tasks.settings.budgets import read_family
from tasks.settings.local_checks import BEFORE_A_RUN
from tasks.settings.yaml_files import read_mapping
from tests.support.fuzzing.broken import broken_bytes, broken_json, json_values
from tests.support.fuzzing.calls import call, examples

ROOT = Path(__file__).resolve().parents[2]
PARAMS = (ROOT / "params.yaml").read_bytes()
VALUES = YAML(typ="safe").load(PARAMS)
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
LAUGHS = b"a0: &a0 [x, x]\n"
LAUGHS += b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 10))
TREES = (
    *(b"&a [*a]", b"seed: &a {b: *a}", LAUGHS, b"[" * 3000, b"a: " + b"{b: " * 3000, b"seed: " + b"- " * 3000),
    *(b"? {a: 1}\n: 2", b"!!python/object:os.x {}", b"? " * 1000),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A directory like a checkout, with params.yaml and a profile."""
    scratch = tmp_path_factory.mktemp("settings")
    shutil.copytree(ROOT / "profiles", scratch / "profiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(scratch)
        settings = check(scratch, PARAMS, "valid")
        assert not isinstance(settings, UserError), settings
        yield scratch


def as_yaml(value) -> bytes:
    return json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf").encode()


def check(scratch, content: bytes, target: str = "params.yaml"):
    """What the checks of all parameters that need no corpora make of a file."""
    path = scratch / "params.yaml"
    path.write_bytes(content)
    settings = call(target, scratch, lambda: load.load("params.yaml"), "params.yaml")
    if not isinstance(settings, UserError) and settings.parent.path is None:
        call(f"{target}: check_family", scratch, lambda: check_family(settings, "params.yaml"), "params.yaml")
    return settings


def check_values(scratch, values, target: str) -> None:
    call(target, scratch, lambda: load.check_values(values, "params.yaml", load.OF_EVERY_STAGE), "params.yaml")


@examples(40)
@given(values=broken_json(VALUES))
def test_values(scratch, values):
    check(scratch, as_yaml(values))
    whole = call(
        "params.yaml: read", scratch, lambda: read_mapping(scratch / "params.yaml", "params.yaml"), "params.yaml"
    )
    if not isinstance(whole, UserError):
        call("params.yaml: all checks", scratch, lambda: commands.check(whole), "params.yaml")


@examples(24)
@given(content=broken_bytes([PARAMS]) | st.binary(max_size=30))
def test_bytes(scratch, content):
    check(scratch, content, "params.yaml bytes")


@pytest.mark.parametrize("tree", TREES)
def test_trees_that_are_too_deep_or_too_large(scratch, tree):
    end = check(scratch, tree, "params.yaml bytes")
    assert isinstance(end, UserError)
    (scratch / "params.yaml").write_bytes(PARAMS)
    (scratch / "profiles" / "mine.yaml").write_bytes(tree)
    call("profile", scratch, lambda: merging.parameters("mine", scratch), "mine.yaml")


@examples(24)
@given(data=st.data())
def test_profiles(scratch, data):
    (scratch / "params.yaml").write_bytes(PARAMS)
    content = data.draw(st.sampled_from(PROFILES)).read_bytes()
    values = broken_json(YAML(typ="safe").load(content)).map(as_yaml)
    file = scratch / "profiles" / "mine.yaml"
    file.write_bytes(data.draw(values | values | broken_bytes([content]) | st.sampled_from(TREES)))
    merged = call("profile", scratch, lambda: merging.parameters("mine", scratch), "mine.yaml")
    if not isinstance(merged, UserError):
        call(
            "profile: check",
            scratch,
            lambda: load.check_values(merged, "params.yaml", load.OF_EVERY_STAGE),
            "params.yaml",
        )


@examples(24)
@given(
    key=st.sampled_from(["seed", "train_short.steps", "budgets", "prepare_data.sources", "parent.path", "a.b", ""]),
    value=st.text(max_size=8) | json_values.map(as_yaml).map(bytes.decode),
)
def test_overrides(scratch, key, value):
    (scratch / "params.yaml").write_bytes(PARAMS)
    text = f"{key}={value}"
    merged = call("override", scratch, lambda: merging.parameters("default", scratch, None, [text]), "override")
    if not isinstance(merged, UserError):
        call(
            "override: check",
            scratch,
            lambda: load.check_values(merged, "params.yaml", load.OF_EVERY_STAGE),
            "params.yaml",
        )


@examples(12)
@given(texts=st.lists(st.text(max_size=8) | st.from_regex(r"\w+=[\d.]{1,9}(MB@|e|ms/token|B|K)?\d*", fullmatch=True)))
def test_families(scratch, texts):
    call("family", scratch, lambda: read_family(texts, "--budget"), "--budget")


@pytest.mark.parametrize("path", ["x" * 300, "y/" * 3000, "\0", "\ud800"], ids=range(4))
def test_paths_that_no_file_can_have(scratch, path):
    """The operating system refuses to look at them, which had ended in its own error."""
    places = [("parent", "path"), ("cost", "table"), ("compute", "storage"), ("evaluate", "benchmarks")]
    for section, name in places:
        values = json.loads(json.dumps(VALUES))
        values[section][name] = {"tasks": ["x"], "include": path, "data_root": path} if name == "benchmarks" else path
        checks = {check: needed for check, needed in BEFORE_A_RUN.items() if needed not in (("prepare_data",), ())}
        end = call("paths", scratch, lambda v=values, c=checks: load.check_values(v, "params.yaml", c), section)
        assert isinstance(end, UserError), (section, name)
