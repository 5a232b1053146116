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
CHECKS = [f"tests/kernels/{name}_checks.py" for name in ("triton", "conv")]


def run_checks(interpret: bool, checks: str):
    """Run the checks in their own process: a kernel is decorated for the one or the other."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, checks], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("checks", CHECKS)
def test_kernels_in_the_interpreter(checks):
    run_checks(True, checks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checks", CHECKS)
def test_kernels_on_the_gpu(checks):
    run_checks(False, checks)


ROWS, VECTOR, WEIGHT, HEADS = (2, 5, 24), (2, 1, 24), (24,), (2, 5, 3, 16)
NORM = {"x_BTD": ROWS, "scale_BTD": VECTOR, "shift_BTD": VECTOR, "weight_D": WEIGHT}
GATE = {"x_BTD": ROWS, "branch_BTD": ROWS, "gate_BTD": VECTOR, "branch_weight_D": WEIGHT}
OPERANDS = {
    "norm:norm_modulate": NORM,
    "norm:norm_modulate_fp8": NORM,
    "norm:gate_residual": GATE,
    "norm:gate_residual_norm": GATE | NORM,
    "norm:gate_residual_norm_fp8": GATE | NORM,
    "qk_norm_rope:qk_norm_rope": {
        "q_BTNH": HEADS, "k_BTNH": HEADS, "weight_q_H": (16,), "weight_k_H": (16,),
        "rope_BTNH": (1, 5, 1, 16),
    },
    "glu:swiglu": {"gate_BTF": ROWS, "up_BTF": ROWS},
    "fp8:swiglu_fp8": {"gate_BTF": ROWS, "up_BTF": ROWS},
    "attention:joint_attention": {"q_BTNH": HEADS, "k_BSNH": HEADS, "v_BSNH": HEADS},
    "solver:solver_step": {"x_BChw": HEADS, "out_Bnf": (2, 48, 5), "m_prev_BChw": HEADS},
}  # fmt: skip


@pytest.mark.parametrize("place", OPERANDS)
def test_refuses_tensors_of_another_device(place):
    module, op = place.split(":")
    call = getattr(pytest.importorskip(f"tdm_kernels.{module}"), op)
    operands = {name: torch.zeros(shape) for name, shape in OPERANDS[place].items()}
    if op == "joint_attention":
        operands["lengths_B"] = torch.ones(2, dtype=torch.int64)
    numbers = {"sigma": 0.5, "c_x": 0.5, "c_m": 0.5, "patch": 1} if op == "solver_step" else {}
    for moved in list(operands)[1:]:
        name = moved.rpartition("_")[0]
        with pytest.raises(ValueError, match=f"^{op}: {name} must be on cpu, not on meta$"):
            call(**{**operands, moved: operands[moved].to("meta")}, **numbers)
    if op == "qk_norm_rope":
        tail = 3, torch.zeros(16), torch.zeros(16, device="meta")
        operands.pop("rope_BTNH")
        with pytest.raises(ValueError, match="tail_k must be on cpu, not on meta"):
            call(**operands, tail=tail)


def test_attention_is_cudnns_where_that_is_faster(monkeypatch, caplog):
    attention = pytest.importorskip("tdm_kernels.attention")
    ran = []
    triton = lambda q, k, v, lengths: ran.append("triton") or q.flatten(2)  # noqa: E731
    monkeypatch.setattr(attention, "triton_attention", triton)
    monkeypatch.setattr(attention, "_failed", set())
    half = torch.randn(3, 2, 5, 3, 16, dtype=torch.bfloat16)
    lengths = torch.ones(2, dtype=torch.int64)
    for leaves, inputs, fused in (
        (True, (*half,), False), (False, (*half,), True), (True, (*half, lengths), True),
        (True, (*half.float(),), True), (True, (half[0, :, :0], *half[1:]), True),
    ):  # fmt: skip
        monkeypatch.setattr(attention, "_leaves_to_cudnn", lambda device, found=leaves: found)
        out = attention.joint_attention(*inputs)
        assert bool(ran) == fused, (leaves, len(inputs))
        ran.clear()
        if not fused:
            like = reference.joint_attention(*half.double()).to(out.dtype)
            torch.testing.assert_close(out, like, atol=1e-2, rtol=2e-2)


def test_cudnn_is_asked_on_some_gpus_and_in_a_sound_version(monkeypatch):
    attention = pytest.importorskip("tdm_kernels.attention")
    leaves = attention._leaves_to_cudnn.__wrapped__
    assert not leaves(torch.device("cpu"))
    for capability, version, found in (
        ((9, 0), 91501, True), ((10, 3), 92000, True), ((9, 0), 91500, False),
        ((9, 0), None, False), ((8, 0), 92000, False), ((12, 0), 92000, False),
    ):  # fmt: skip
        given = lambda device, found=capability: found  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_capability", given)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda found=version: found)
        assert leaves(torch.device("cuda")) == found, (capability, version)


def test_the_library_orders_its_backends_before_it_is_asked_for_one(monkeypatch):
    attention = pytest.importorskip("tdm_kernels.attention")
    half, chosen = torch.randn(3, 2, 5, 3, 16, dtype=torch.bfloat16), []
    choose, within = torch._fused_sdp_choice, attention.sdpa_kernel
    monkeypatch.setattr(
        torch, "_fused_sdp_choice", lambda *rows: chosen.append("order") or choose(*rows)
    )
    monkeypatch.setattr(
        attention,
        "sdpa_kernel",
        lambda *given, **how: chosen.append("asked") or within(*given, **how),
    )
    attention._settle_order.cache_clear()
    for _ in range(2):
        attention.cudnn_attention(*half)
    assert chosen == ["order", "asked", "asked"]


def test_attention_goes_on_where_cudnn_fails(monkeypatch, caplog):
    attention = pytest.importorskip("tdm_kernels.attention")
    asked, error = [], RuntimeError("cuDNN Frontend error: no plan")

    def fails(q, k, v):
        asked.append(q.shape)
        raise error

    monkeypatch.setattr(attention, "triton_attention", lambda q, k, v, lengths: q.flatten(2))
    monkeypatch.setattr(attention, "cudnn_attention", fails)
    monkeypatch.setattr(attention, "_leaves_to_cudnn", lambda device: True)
    monkeypatch.setattr(attention, "_failed", set())
    half = torch.randn(3, 2, 5, 3, 16, dtype=torch.bfloat16)
    for rows in (half, half, half[:, :1]):
        assert torch.equal(attention.joint_attention(*rows), rows[0].flatten(2))
    assert len(asked) == 2 and caplog.text.count("no plan") == 2  # once for every shape
    for error in (torch.OutOfMemoryError("full"), torch.AcceleratorError("lost")):
        with pytest.raises(type(error)):
            attention.joint_attention(*half[:, :, :2])
    assert len(attention._failed) == 2


def test_auto_takes_triton_on_cuda():
    norm = pytest.importorskip("tdm_kernels.norm")
    attention = pytest.importorskip("tdm_kernels.attention")
    group_norm = pytest.importorskip("tdm_kernels.group_norm")
    solver = pytest.importorskip("tdm_kernels.solver")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ops = registry.select("auto", "cuda", dtype)
        assert ops.norm_modulate is norm.norm_modulate
        assert ops == registry.select("triton", "cuda", dtype)
        assert ops.joint_attention is attention.joint_attention
        assert ops.pack_conv is group_norm.pack_conv
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
