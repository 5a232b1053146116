"""Runs the checks against NVIDIA's bindings of classic TensorRT, where these are installed."""

import shutil
from importlib.util import find_spec

import pytest

from tests.kernels.test_triton import run_checks

pytest.importorskip("onnx")


@pytest.mark.skipif(
    find_spec("tensorrt_bindings") is None or shutil.which("cc") is None,
    reason="needs a C compiler, and: pip install --no-deps tensorrt-cu13-bindings",
)
def test_what_is_asked_of_tensorrt():
    run_checks(interpret=False, checks="tests/export/frontend_checks.py")
