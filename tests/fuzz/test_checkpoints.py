"""Training checkpoints with broken files: skipped with a warning, never loaded."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_core.training.checkpoint import Checkpoints
from tests.support.fuzzing import directories
from tests.support.fuzzing.broken import broken_bytes, broken_file
from tests.support.fuzzing.calls import call, examples

TENSORS = {"weight": torch.arange(60.0).view(6, 10), "step": torch.tensor(3.0)}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """The checkpoints of steps 1 and 2 in the directory `valid`."""
    scratch = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(scratch / "valid")
    for step in (1, 2):
        checkpoints.save(step, {name: value + step for name, value in TENSORS.items()}, {"step": step})
        checkpoints.wait()
    load(scratch, scratch / "valid", 2)
    return scratch


def load(scratch, directory, step: int | None) -> None:
    """The newest checkpoint is that of `step`, with its tensors; None: there is none."""
    tensors = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    progress = call("checkpoint", scratch, lambda: Checkpoints(directory).load_newest(tensors))
    assert progress == (None if step is None else {"step": step})
    for name, value in tensors.items():
        assert torch.equal(value, torch.zeros_like(value) if step is None else TENSORS[name] + step)


@examples(20)
@given(data=st.data(), both=st.booleans())
def test_a_broken_checkpoint_is_skipped(scratch, data, both):
    directory = directories.copy(scratch / "valid", scratch / "broken")
    expected = 2
    for step in (2, 1) if both else (2,):
        file = data.draw(st.sampled_from(sorted((directory / f"step-{step:08d}").iterdir())))
        valid = file.read_bytes()
        kind = broken_file(json.loads(valid)) if file.name == "manifest.json" else broken_bytes([valid])
        file.write_bytes(content := data.draw(kind))
        if same_content(valid, content, file.name):
            break
        expected = step - 1 or None
    load(scratch, directory, expected)


def same_content(one: bytes, other: bytes, name: str) -> bool:
    """Whether two files are equal; a manifest may be spelled differently, but 2.0 is another value than 2."""
    if one == other or name != "manifest.json":
        return one == other
    try:
        return json.dumps(json.loads(one), sort_keys=True) == json.dumps(json.loads(other), sort_keys=True)
    except (ValueError, RecursionError):
        return False
