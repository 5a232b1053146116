"""What the tests of several C++ kernels share."""

import pytest
from tdm_kernels import native


@pytest.fixture(params=["avx512", "avx2", "portable"])
def instruction_set(request):
    """Run a test once with each set of kernels this machine can execute."""
    fastest = native.instruction_set()
    try:
        native.use_instruction_set(request.param)
    except RuntimeError:
        pytest.skip(f"this machine does not run {request.param}")
    yield request.param
    native.use_instruction_set(fastest)
