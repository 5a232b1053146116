"""The Triton kernels that quantise, against the reference. Run by test_fp8.py, as triton_checks."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import triton.language as tl
from tdm_kernels import fp8, glu, norm, reference_fp8
from triton.runtime import interpreter

from tests.kernels.test_fp8 import assert_within_half_a_step
from tests.kernels.triton_checks import (  # noqa: F401
    DTYPES,
    HALF,
    INTERPRETED,
    inside_nan,
    poisoned_buffers,
    randn,
)

# What cuBLAS asks for where torch is to be deterministic, which is how buffers get their NaN.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Compute capability 8.9 converts by way of fp16: within the error's bound, but not to the bit.
EXACT = INTERPRETED or torch.cuda.get_device_capability() >= (9, 0)
# B, T, F: one block, one with a ragged end, two, three.
SHAPES = [(3, 1, 7), (1, 63, 40), (1, 2, 2100), (1, 1, 5000)]
if not INTERPRETED:
    SHAPES += [(2, 77, 6144), (1, 1000, 10240)]
WIDTHS = [24, 200] if INTERPRETED else [24, 200, 1536, 3840]


@pytest.fixture(autouse=True)
def casts_of_the_hardware(monkeypatch):
    """Cast to e4m3 as torch does, to the nearest and even: what cvt.rn.satfinite.e4m3x2 does too.

    The interpreter's own cast rounds halves up, and to 2^-7 what rounds up to 2^-6.
    """
    plain = interpreter._convert_float

    def convert(data, source, target, rounding):
        if target != tl.float8e4nv:
            return plain(data, source, target, rounding)
        rows = torch.from_numpy(np.ascontiguousarray(data))
        return rows.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    if INTERPRETED:
        monkeypatch.setattr(interpreter, "_convert_float", convert)


def assert_same_rows(found, like):
    """The same scales to the bit, and the same values, or a neighbour on devices that round so."""
    assert found.shape == like.shape and found.scale.shape == like.scale.shape
    torch.testing.assert_close(found.scale, like.scale, rtol=0, atol=0, equal_nan=True)
    rtol, atol = (0, 0) if EXACT else (2**-3, 2**-9)
    values, like_values = found.values.float(), like.values.float()
    torch.testing.assert_close(values, like_values, rtol=rtol, atol=atol, equal_nan=True)


def check(found, plain, exact):
    """`plain` is the row from the unfused kernel, in fp32; `exact` the truth in fp64."""
    assert_within_half_a_step(found, exact, slack=1e-5)
    if INTERPRETED:  # a compiler may fuse the two kernels' products and sums differently
        assert_same_rows(found, reference_fp8.quantize_rows(plain))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_rows(shape, dtype):
    x = inside_nan(randn(*shape, seed=1, dtype=dtype) * 6e3)
    assert_same_rows(fp8.quantize_rows(x), reference_fp8.quantize_rows(x))
    weight = x[0]
    assert_same_rows(fp8.quantize_rows(weight), reference_fp8.quantize_rows(weight))
    swapped = x.transpose(0, 1)
    assert_same_rows(fp8.quantize_rows(swapped), reference_fp8.quantize_rows(swapped))


def test_rows_that_cannot_be_scaled():
    x = randn(1, 7, 2100, seed=1)
    x[0, 1] = 0
    x[0, 2, 2050], x[0, 3, 5], x[0, 4, 5] = float("nan"), float("inf"), -float("inf")
    x[0, 5] *= 1e-39
    x[0, 6] *= 6e37
    found = fp8.quantize_rows(x)
    assert_same_rows(found, reference_fp8.quantize_rows(x))
    assert found.values[0, 2].isnan().all()
    ones = torch.ones_like(x)
    for rows in (fp8.swiglu_fp8(ones, x), fp8.gelu_tanh_fp8(x), norm.norm_modulate_fp8(x)):
        lost = rows.dequantize()[0].isnan().any(-1).tolist()
        # The square of a number beyond 2e19 overflows in a norm, and minus infinity has a gelu.
        assert lost[:4] == [False, False, True, True] and not lost[5]
    assert fp8.quantize_rows(x[:, :0]).shape == (1, 0, 2100)


def test_halves_round_to_even():
    x = torch.tensor([[448.0, 1.0625, 1.1875, -1.0625, 1.0625 + 2**-12, 2**-10, 0.0155]])
    x = x.to(randn(1, seed=1).device)
    found = fp8.quantize_rows(x).values.float()
    assert found.tolist() == [[448, 1, 1.25, -1, 1.125 if EXACT else 1, 0, 2**-6]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations(shape, dtype):
    x = inside_nan(randn(*shape, seed=1, dtype=dtype) * 4)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    check(fp8.gelu_tanh_fp8(x), activation("gelu_tanh", x), exact)
    gate, up = randn(*shape[:2], 2 * shape[2], seed=2, dtype=dtype).chunk(2, -1)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    check(fp8.swiglu_fp8(gate, up), activation("swiglu", gate, up), exact)
    # Beyond what half precision can hold.
    gate, up = gate * 100, up.float() * 1000
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    check(fp8.swiglu_fp8(gate, up), activation("swiglu", gate, up), exact)


def activation(op, *rows):
    """The op's unfused kernel, in fp32."""
    return getattr(glu, op)(*(x.float() for x in rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("weighted", [False, True])
def test_norms(dtype, d, weighted):
    x, branch = (inside_nan(randn(2, 5, d, seed=s, dtype=dtype) * 3 + 1) for s in (1, 2))
    gate, scale, shift = inside_nan(randn(3, 2, 1, d, seed=3)).unbind()
    options = {"weight_D": randn(d, seed=4)} if weighted else {}
    for vectors in ((), (scale,), (scale[:1], shift[:1]), (randn(2, 2, 1, d, seed=5),) * 2):
        exact = norm_fp64(x, *vectors, **options)
        plain = norm.norm_modulate(x.float(), *vectors, **options)
        check(norm.norm_modulate_fp8(x, *vectors, **options), plain, exact)
    branch_weight = {"branch_weight_D": randn(d, seed=6)} if weighted else {}
    inputs = (x, branch, gate, scale, shift)
    h, found = norm.gate_residual_norm_fp8(*inputs, **branch_weight, **options)
    like, _ = norm.gate_residual_norm(*inputs, **branch_weight, **options)
    assert torch.equal(h, like)
    plain = norm.norm_modulate(h.float(), scale, shift, **options)
    check(found, plain, norm_fp64(h, scale, shift, **options))


def norm_fp64(x, scale=None, shift=None, weight_D=None):
    width = x.shape[-1:]
    if weight_D is None:
        y = torch.nn.functional.layer_norm(x.double(), width, eps=1e-6)
    else:
        y = torch.nn.functional.rms_norm(x.double(), width, weight_D.double(), 1e-6)
    y = y if scale is None else y * scale.double()
    return y if shift is None else y + shift.double()


@pytest.mark.parametrize("rows", [1, 63, 77])
def test_scaled_linear(rows):
    """The matrix product of the device: cuBLAS or CUTLASS on a GPU, oneDNN or a loop on a CPU."""
    f, d = (48, 64) if INTERPRETED else (3840, 10240)
    weight, bias = randn(f, d, seed=1, dtype=HALF), randn(f, seed=2, dtype=HALF)
    linear = fp8.pack_linear_fp8(weight, bias, [weight])
    x = inside_nan(randn(2, rows, d, seed=3) * 1e4)
    quantized = fp8.quantize_rows(x)
    found, like = linear(quantized), reference_fp8.scaled_linear(quantized, linear.quantized, bias)
    assert torch.equal(found, linear(x)) and found.dtype == torch.bfloat16
    exact = quantized.values.double() * quantized.scale.double()
    exact = exact @ (linear.quantized.values.double() * linear.quantized.scale.double()).mT
    exact += bias.double()
    error, allowed = ((y.double() - exact).abs().max() for y in (found, like))
    assert error <= 2 * allowed + 2 * 2**-8 * exact.abs().max()


def test_refuses_what_the_kernels_cannot_read():
    x = randn(2, 5, 24, seed=1)
    for call, message in (
        (lambda: fp8.quantize_rows(x.double()), "x must be float32"),
        (lambda: fp8.quantize_rows(x[0, 0]), "x must have 2 axes"),
        (lambda: fp8.swiglu_fp8(x, x[..., :12]), "up must be"),
        (lambda: fp8.gelu_tanh_fp8(x[0]), "x must have 3 axes"),
        (lambda: norm.norm_modulate_fp8(x.double()), "x must be float32"),
        (lambda: norm.gate_residual_norm_fp8(x, x[:, :4]), "branch must be"),
        (lambda: fp8.pack_linear_fp8(x[0], None, []), "weight must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_gate_and_up_may_have_rows_of_unlike_strides():
    gate, up = randn(1, 3, 80, seed=2, dtype=HALF).chunk(2, -1)
    assert_same_rows(fp8.swiglu_fp8(gate, up.contiguous()), fp8.swiglu_fp8(gate, up))
