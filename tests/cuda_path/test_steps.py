"""Whole steps, ranking, scores and generation on a GPU that is not there: nothing mixes devices, nothing waits for it.

See tests/support/cuda/pretend.py. What kernels compute is not proven by it, and no speed.
"""

import functools

import pytest

from tests.support.cuda import guard
from tests.support.cuda.processes import results_of
from tests.support.marks import thorough, thorough_but

STEPS = ("members bfloat16", "soft bfloat16", "hard routing bfloat16", "one document, recomputed")
STEPS += ("trainable teacher float32", "mixed teacher", "moe members bfloat16", "moe soft bfloat16")
STEPS += ("moe members float32", "moe soft float32")
STEPS += ("llama members bfloat16", "llama soft float32", "cached teacher")
STEPS += ("part of rows soft", "part of rows hard routing")
OTHERS = ("not finite", "rank by projection", "rank by output", "rank llama", "rank bfloat16", "scores", "nested")
OTHERS += ("nested llama", "evaluation")
PLANTED = "planted"
QUICK = ("soft bfloat16", "moe members bfloat16", "cached teacher", "not finite")
QUICK += ("rank by output", "scores", "nested", "evaluation", PLANTED)

pytestmark = [
    pytest.mark.cuda_path,
    pytest.mark.timeout(900),  # seconds, on a busy machine; alone it takes half a minute
    pytest.mark.skipif(guard.reason() is not None, reason=guard.reason() or ""),
]


@functools.cache
def results(are_quick: bool) -> dict:
    """What the quick cases did, or the others, by their names."""
    return results_of("cases", *(name for name in (*STEPS, *OTHERS, PLANTED) if (name in QUICK) == are_quick))


def result_of(name: str) -> dict:
    return results(name in QUICK)[name]


@pytest.mark.parametrize("name", thorough_but(QUICK, STEPS))
def test_a_step_mixes_no_devices_and_waits_once(name):
    result = result_of(name)
    assert result["problem"] is None, result["problem"]
    assert result["mixed"] == {}
    assert result["wait"] == {}
    (where,) = result["to host"].items()  # the losses, the norm and the gradients of the router's gates, together
    assert where == ("aten._to_copy.default in elastic_core/training/loop.py:fetch_numbers", 1)
    assert result["scores kept"] == []


@pytest.mark.parametrize("name", ["soft bfloat16", thorough("hard routing bfloat16")])
def test_gates_and_indices_are_copied_together(name):
    """Per microbatch: two of token ids, five of documents, one of gates, one of indices."""
    assert sum(result_of(name)["to device"].values()) <= 2 * 9


@pytest.mark.parametrize(
    "name, is_grouped",
    [("moe members bfloat16", True), thorough("moe soft bfloat16", True), thorough("moe members float32", False)],
)
def test_experts_are_multiplied_together_in_bfloat16(name, is_grouped):
    assert (result_of(name)["grouped"] > 0) == is_grouped


@pytest.mark.parametrize("name", thorough_but(QUICK, OTHERS))
def test_other_work_mixes_no_devices(name):
    result = result_of(name)
    assert result["problem"] is None, result["problem"]
    assert result["mixed"] == {}
    assert result["scores kept"] == []


def test_planted_faults_are_noticed():
    result = result_of(PLANTED)
    assert result["problem"] is None, result["problem"]
    assert sum(result["wait"].values()) == 2 and sum(result["to host"].values()) == 1
    assert sum(result["mixed"].values()) == 1
