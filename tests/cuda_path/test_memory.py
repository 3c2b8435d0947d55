"""The memory of a sharded step in the shapes of the 12B, on tensors that pretend to be on a GPU, against the plan."""

import pytest

from tests.support.cuda import guard, interpreted
from tests.support.cuda.processes import results_of

NEAR = 0.15  # of what is counted

pytestmark = [
    pytest.mark.cuda_path,
    pytest.mark.thorough,
    pytest.mark.timeout(900),
    pytest.mark.skipif(guard.reason() is not None, reason=guard.reason() or ""),
]


def test_the_plan_counts_what_a_sharded_step_holds():
    found = results_of("memory_cases")
    assert found.keys() == {"train_short", "train_extended"}
    for stage in found.values():
        assert stage["planned"] == pytest.approx(stage["counted"], rel=NEAR), stage
    assert found["train_short"]["with kernels"] is None  # the router learns with gates


@pytest.mark.skipif(interpreted.reason() is not None, reason=interpreted.reason() or "")
def test_the_plan_counts_what_kernels_hold():
    (stage,) = results_of("memory_cases", "kernels").values()
    assert stage["with kernels"] == pytest.approx(stage["counted"], rel=NEAR), stage
    assert stage["with kernels"] < stage["planned"]
