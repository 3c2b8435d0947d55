"""mamba_ssm's kernels through our own code, interpreted on the CPU, against torch: outputs and all gradients.

The convolution is a stand-in with the checks of causal_conv1d (tests/support/cuda/conv_stand_in.py).
"""

import functools

import pytest

from benchmarks.kernels import LAYER
from tests.support.cuda import interpreted
from tests.support.cuda.processes import results_of
from tests.support.marks import thorough_but

FLOAT32 = 2e-5  # sums in another order, over a few hundred positions
BFLOAT16 = 2e-2  # kernels round the weights of a chunk to 8 bits before they multiply
CASES = {
    "scan (1, 2, 16, 1, 16, 1)": FLOAT32,
    "scan (140, 3, 40, 1, 16, 2)": FLOAT32,
    "scan with documents": FLOAT32,
    "scan bfloat16": BFLOAT16,
    "scan with a state": FLOAT32,
    "gated norm": FLOAT32,
    "layer whole": FLOAT32,
    "layer sliced": FLOAT32,
    "layer in parts": FLOAT32,
    "layer with gates": FLOAT32,
    "one token": FLOAT32,
    "layer of the benchmark": LAYER,
}
QUICK = ("scan with documents", "gated norm", "layer sliced")

pytestmark = [
    pytest.mark.cuda_path,
    pytest.mark.timeout(900),  # seconds, on a busy machine; alone it takes half a minute
    pytest.mark.skipif(interpreted.reason() is not None, reason=interpreted.reason() or ""),
]


@functools.cache
def deviations(are_quick: bool) -> dict[str, float]:
    """Those of the quick cases, or of the others, by their names."""
    return results_of("kernel_cases", *([] if are_quick else ["--but"]), *QUICK)


@pytest.mark.parametrize("name", thorough_but(QUICK, CASES))
def test_kernels_compute_what_torch_does(name):
    assert deviations(name in QUICK)[name] < CASES[name]


@pytest.mark.thorough
def test_every_case_has_a_bound():
    assert deviations(True).keys() | deviations(False).keys() == CASES.keys()
