"""Rows in e4m3: the reference against the number format and fp64, and when they are bound."""

import pytest
import torch
from tdm_kernels import reference, registry
from tdm_kernels import reference_fp8 as plain
from tdm_kernels.quantized import Quantized
from torch.nn import functional as F

from tests.kernels.compare import randn
from tests.kernels.test_triton import run_checks

CHECKS = "tests/kernels/fp8_checks.py"
TOKENS = [1, 63, 77]
D = 48


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    run_checks(interpret=True, checks=CHECKS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_gpu():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    run_checks(interpret=False, checks=CHECKS)


def assert_within_half_a_step(found, exact, slack=1e-6):
    """Every element at most half the distance between e4m3 neighbours away, and `slack` of amax."""
    assert found.shape == exact.shape and found.scale.shape == (*exact.shape[:-1], 1)
    assert found.values.dtype == torch.float8_e4m3fn and found.scale.dtype == torch.float32
    scale, exact = found.scale.double(), exact.double()
    error = (found.values.double() * scale - exact).abs()
    amax = exact.abs().amax(-1, keepdim=True)
    assert (error <= torch.maximum(exact.abs() / 16, scale / 1024) + slack * amax).all()
    # The widest half step is 16 of 448.
    assert (error <= torch.maximum(amax / 28, scale / 1024) + slack * amax).all()


def test_every_e4m3_number_survives():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    row = codes[~codes.float().isnan()]
    for exponent in (-100, -3, 0, 7, 100):
        found = plain.quantize_rows(row.float()[None] * 2.0**exponent)
        assert found.scale.item() == 2.0**exponent
        assert torch.equal(found.values[0].view(torch.uint8), row.view(torch.uint8))


def test_rounds_halves_to_even_and_from_fp32():
    x = torch.tensor([[448.0, 1.0625, 1.1875, -1.0625, 1.0625 + 2**-12, 2**-10, 3 * 2**-10, 447]])
    like = torch.tensor([[448, 1, 1.25, -1, 1.125, 0, 2**-8, 448]])
    assert torch.equal(plain.quantize_rows(x).values.float(), like)
    assert x.bfloat16()[0, 4] == 1.0625  # by way of bf16 it would have become 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 6e4])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_quantize_rows(num_tokens, magnitude, dtype):
    x = magnitude * torch.rand(2, num_tokens, D, generator=torch.Generator().manual_seed(1))
    x = (x * randn(2, num_tokens, D, seed=2).sign() * torch.logspace(-6, 0, D)).to(dtype)
    found = plain.quantize_rows(x)
    assert_within_half_a_step(found, x)
    again = plain.quantize_rows(found.dequantize())
    assert torch.equal(again.values.float(), found.values.float())
    torch.testing.assert_close(again.scale, found.scale, rtol=2**-22, atol=0)
    strided = plain.quantize_rows(x.transpose(0, 1)).values
    assert strided.is_contiguous()
    assert torch.equal(strided.float(), found.values.float().transpose(0, 1))


def test_rows_that_cannot_be_scaled():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[0, 0, 0], [1e-40, 0, 0], [3e38, 1e38, 0], [1, nan, 0], [1, inf, 0]])
    found = plain.quantize_rows(x)
    assert found.scale[:2].eq(2.0**-126).all() and found.scale[:3].isfinite().all()
    assert torch.equal(found.values[0].float(), torch.zeros(3))
    assert_within_half_a_step(Quantized(found.values[:3], found.scale[:3]), x[:3])
    assert found.values[3].isnan().all() and found.dequantize()[3:].isnan().all()
    weight = plain.quantize_rows(randn(16, 16, seed=1))
    rows = plain.quantize_rows(F.pad(x, (0, 13)))
    out = plain.scaled_linear(rows, weight)
    assert out[:2].isfinite().all() and out[3:].isnan().all()


def layer_norm(x):
    return F.layer_norm(x.double(), x.shape[-1:], eps=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_producers(num_tokens, dtype):
    x, f = (randn(2, num_tokens, D, seed=s, dtype=dtype) * 3 for s in (1, 2))
    gate, scale, shift = (randn(2, 1, D, seed=s) for s in (3, 4, 5))
    weight = randn(D, seed=6)
    found = plain.norm_modulate_fp8(x, scale, shift)
    assert_within_half_a_step(found, layer_norm(x) * scale + shift)
    h, found = plain.gate_residual_norm_fp8(
        x, f, gate, scale, branch_weight_D=weight, weight_D=weight
    )
    like = reference.gate_residual(x, f, gate, branch_weight_D=weight)
    assert torch.equal(h, like)
    like = F.rms_norm(h.double(), (D,), weight.double(), 1e-6) * scale
    assert_within_half_a_step(found, like)
    assert_within_half_a_step(plain.swiglu_fp8(x, f), F.silu(x.double()) * f.double())
    like = F.gelu(x.double(), approximate="tanh")
    assert_within_half_a_step(plain.gelu_tanh_fp8(x), like)


def test_values_beyond_half_precision_are_not_lost():
    gate, up = (torch.full((1, 2, 16), value, dtype=torch.float16) for value in (300.0, 1000.0))
    found = plain.swiglu_fp8(gate, up)
    torch.testing.assert_close(found.dequantize(), torch.full((1, 2, 16), 3e5))


def test_two_modulations_unpack_as_a_tensor_does():
    x, scale, shift = randn(2, 5, D, seed=1), randn(2, 2, 1, D, seed=2), randn(2, 2, 1, D, seed=3)
    both = plain.norm_modulate_fp8(x, scale, shift)
    assert both.shape == (2, 2, 5, D) and len(both) == 2
    for found, s, t in zip(both, scale, shift, strict=True):
        like = plain.norm_modulate_fp8(x, s, t)
        assert torch.equal(found.dequantize(), like.dequantize())


@pytest.mark.parametrize("module", ["reference_fp8", "fp8"])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_scaled_linear(num_tokens, module):
    """torch._scaled_mm multiplies on a CPU as well."""
    module = pytest.importorskip(f"tdm_kernels.{module}")
    x = plain.quantize_rows(randn(2, num_tokens, D, seed=1) * torch.logspace(-3, 4, D))
    weight, bias = plain.quantize_rows(randn(32, D, seed=2)), randn(32, seed=3)
    exact = (x.values.double() * x.scale) @ (weight.values.double() * weight.scale).mT
    for b in (None, bias.bfloat16()):
        found = module.scaled_linear(x, weight, b)
        assert found.dtype == torch.bfloat16
        like = exact if b is None else exact + b.double()
        torch.testing.assert_close(found.double(), like, rtol=2**-8, atol=1e-5 * like.abs().max())


def test_scaled_linear_says_what_it_cannot_multiply():
    x, weight = (plain.quantize_rows(randn(n, 32, seed=n)) for n in (5, 48))
    for args, message in (
        (
            (x, plain.quantize_rows(randn(40, 32, seed=1))),
            "weight must be .*not \\[40, 32\\]",
        ),
        (
            (x, plain.quantize_rows(randn(48, 24, seed=1))),
            "weight must be .*not \\[48, 24\\]",
        ),
        ((plain.quantize_rows(randn(5, 16, seed=1)), weight), "x must have rows of 32"),
        ((x, weight, randn(32, seed=1)), "bias must be \\[48\\], not \\[32\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            plain.scaled_linear(*args)
    with pytest.raises(ValueError, match="weight must be"):
        plain.pack_linear_fp8(randn(10, 32, seed=1), None, [])


def test_packed_linear_follows_its_weight_and_takes_plain_rows():
    weight, bias = torch.nn.Parameter(randn(32, D, seed=1)), randn(32, seed=2)
    linear = plain.pack_linear_fp8(weight.detach(), bias, [weight])
    x = randn(2, 5, D, seed=3)
    found = linear(x)
    assert torch.equal(found, linear(plain.quantize_rows(x)))
    error = (found.float() - F.linear(x, weight, bias)).detach()
    assert error.square().mean() < 0.05**2 * D  # 3.7% of each of D products of variance 1
    values, version = linear.quantized.values, linear.quantized.values._version
    linear(x)
    assert values._version == version
    with torch.no_grad():
        weight.mul_(2)
    doubled = linear(x)
    assert linear.quantized.values is values and values._version > version
    torch.testing.assert_close(doubled.float() - bias, 2 * (found.float() - bias), rtol=0, atol=0.2)


def test_packed_linear_writes_where_it_is_told_and_activates():
    weight, bias, x = randn(32, D, seed=1), randn(32, seed=2), randn(2, 5, D, seed=3)
    linear = plain.pack_linear_fp8(weight, bias, [weight])
    rows = torch.zeros(2, 9, 32)
    linear(x, rows[:, 4:])
    assert torch.equal(rows[:, 4:], linear(x).float()) and not rows[:, :4].any()
    activated = plain.pack_linear_fp8(weight, bias, [weight], gelu=True)
    assert_within_half_a_step(activated(x), F.gelu(linear(x).double(), approximate="tanh"))
    with pytest.raises(ValueError, match="out cannot receive activated rows"):
        activated(x, rows[:, 4:])


def test_select_binds_the_quantised_forms():
    ops = registry.select("auto", "cpu", grad=False, rows="fp8")
    for op in registry.FP8_OPS:
        assert getattr(ops, op) is getattr(plain, f"{op}_fp8")
    assert ops.joint_attention is registry.select("auto", "cpu", grad=False).joint_attention
    with pytest.raises(ValueError, match="swiglu_fp8: reference has no backward pass"):
        registry.select("auto", "cpu", rows="fp8")
    with pytest.raises(ValueError, match="swiglu_fp8: triton needs a CUDA device"):
        registry.select("triton", "cpu", grad=False, rows="fp8")


def test_triton_asks_for_a_device_that_knows_e4m3(monkeypatch):
    norm, fp8 = pytest.importorskip("tdm_kernels.norm"), pytest.importorskip("tdm_kernels.fp8")

    def reason(dtype=torch.bfloat16):
        return registry.explain("cuda", dtype, grad=False)["pack_linear_fp8"]["triton"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason().startswith("needs a CUDA device that is here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert reason() == "needs compute capability 8.9 for e4m3, not 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert reason(torch.float16) == "multiplies e4m3 into bfloat16, not into torch.float16"
    assert reason() == "ok"
    for backend in ("auto", "triton"):
        ops = registry.select(backend, "cuda", torch.bfloat16, grad=False, rows="fp8")
        assert ops.norm_modulate is norm.norm_modulate_fp8
        assert ops.pack_linear is fp8.pack_linear_fp8
        assert ops.gate_residual is norm.gate_residual


def test_compiles_in_one_graph():
    weight = randn(32, D, seed=1)
    linear = plain.pack_linear_fp8(weight, None, [weight])
    activated = plain.pack_linear_fp8(weight, None, [weight], gelu=True)

    def block(x):
        h, y = plain.gate_residual_norm_fp8(x, x)
        return h, linear(y), linear(x), activated(y).dequantize()

    x = randn(2, 5, D, seed=2)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for found, like in zip(compiled(x), block(x), strict=True):
        torch.testing.assert_close(found, like)
