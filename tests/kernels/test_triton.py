"""Runs the checks of the Triton ops, and holds the registry to when it takes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tdm_kernels import reference, registry
from tdm_kernels.__main__ import main

ROOT = Path(__file__).parents[2]
CHECKS = "tests/kernels/triton_checks.py"


def run_checks(interpret: bool, checks: str = CHECKS):
    """Run the checks in their own process: a kernel is decorated for the one or the other."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, checks], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    run_checks(interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_gpu():
    run_checks(interpret=False)


def test_auto_takes_triton_on_cuda():
    norm = pytest.importorskip("tdm_kernels.norm")
    attention = pytest.importorskip("tdm_kernels.attention")
    solver = pytest.importorskip("tdm_kernels.solver")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ops = registry.select("auto", "cuda", dtype)
        assert ops.norm_modulate is norm.norm_modulate
        assert ops == registry.select("triton", "cuda", dtype)
        assert ops.joint_attention is attention.joint_attention
        # For inference only, and yet bound by a model that also trains.
        assert ops.solver_step is solver.solver_step
    odd = registry.select("auto", "cuda", torch.bfloat16, head_dim=24)
    assert odd.joint_attention is reference.joint_attention
    assert registry.explain("cuda", torch.bfloat16)["swiglu"]["triton"] == "ok"
    assert registry.select("auto", "cuda", torch.float64).swiglu is reference.swiglu


def test_says_why_triton_cannot_run(monkeypatch, capsys):
    with pytest.raises(ValueError, match="swiglu: triton needs a CUDA device"):
        registry.select("triton", "cpu")
    assert main(["--device", "cpu"]) == 0
    assert "triton: needs a CUDA device" in capsys.readouterr().out
    reason = registry.explain("cuda", torch.float64)["gelu_tanh"]["triton"]
    assert reason == "reads float32, bfloat16 and float16, not torch.float64"
    with pytest.raises(ValueError, match=r"takes heads \(16, 32, 64, 128\) wide, not 24"):
        registry.select("triton", "cuda", head_dim=24)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it now raises ImportError
    assert registry.explain("cuda", torch.bfloat16)["swiglu"]["triton"] == "is not installed"
    assert registry.select("auto", "cuda", torch.bfloat16).swiglu is reference.swiglu


def test_a_cpu_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from tdm_kernels import select; select('auto', 'cpu')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
