"""Rows in int8: against their definition, exact sums, and the ops that they are made of."""

import pytest
import torch
from tdm_kernels import int8, reference, registry
from tdm_kernels.quantized import Quantized
from torch.nn import functional as F

from tests.kernels.compare import randn

TOKENS = [1, 16, 17, 77]  # torch._int_mm on CUDA takes 17 rows and more
D = 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 6e4])
def test_quantize_rows(magnitude, dtype):
    x = (magnitude * randn(2, 5, D, seed=1) * torch.logspace(-3, 0, 5)[:, None]).to(dtype)
    found = int8.quantize_rows(x)
    assert found.values.dtype == torch.int8 and found.scale.dtype == torch.float32
    assert found.shape == x.shape and found.scale.shape == (2, 5, 1) and found.dtype == dtype
    torch.testing.assert_close(found.scale, x.float().abs().amax(-1, keepdim=True) / 127)
    assert found.values.abs().amax(-1).eq(127).all()
    error = (found.values.double() * found.scale.double() - x.double()).abs()
    assert (error <= 0.5001 * found.scale.double()).all()
    swapped = int8.quantize_rows(x.transpose(0, 1)).values
    assert swapped.is_contiguous() and torch.equal(swapped, found.values.transpose(0, 1))


def test_every_number_survives_and_halves_round_to_even():
    row = torch.arange(-127.0, 128.0)
    for exponent in (-100, -3, 0, 7, 100):
        found = int8.quantize_rows(row[None] * 2.0**exponent)
        assert found.scale.item() == 2.0**exponent
        assert torch.equal(found.values[0].float(), row)
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -1.5, 2.5, 126.4, -126.6]])
    like = torch.tensor([[127, 0, 2, 0, -2, 2, 126, -127]])
    assert torch.equal(int8.quantize_rows(x).values, like.to(torch.int8))


def test_rows_that_cannot_be_scaled():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[0, 0, 0], [1e-40, 0, 0], [3e38, 1e38, 0], [1, nan, 0], [1, inf, 0]])
    found = int8.quantize_rows(F.pad(x, (0, 13)))
    assert found.scale[:2].eq(2.0**-126).all() and found.scale[:3].isfinite().all()
    assert not found.values[:2].any() and found.values[2, :3].tolist() == [127, 42, 0]
    assert found.dequantize()[3:].isnan().all()
    out = int8.scaled_linear(found, int8.quantize_rows(randn(16, 16, seed=1)))
    assert out[:2].isfinite().all() and out[3:].isnan().all()


def integers(*shape, seed):
    """Rows of whole numbers up to 127, each with a power of two for a scale."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, shape, generator=generator)
    values[..., 0] = 127
    power = torch.randint(-9, 9, (*shape[:-1], 1), generator=generator)
    return Quantized(values.to(torch.int8), 2.0**power, torch.float32)


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_the_product_is_that_of_the_dequantised_rows(num_tokens):
    x, weight = integers(2, num_tokens, D, seed=1), integers(24, D, seed=2)
    for bias in (None, 2.0 ** torch.arange(-4.0, 20.0)):
        # Nothing rounds: 48 products of 14 bits, powers of two, and a bias within their reach.
        like = F.linear(
            x.dequantize().double(),
            weight.dequantize().double(),
            bias.double() if bias is not None else None,
        )
        found = int8.scaled_linear(x, weight, bias)
        assert found.dtype == torch.float32
        if bias is None:
            assert torch.equal(found.double(), like)
        torch.testing.assert_close(found.double(), like, rtol=2**-23, atol=0)
        low = int8.scaled_linear(Quantized(x.values, x.scale, torch.bfloat16), weight, bias)
        assert torch.equal(low, found.bfloat16())  # rounded once, from fp32


def test_sums_do_not_saturate():
    ends = torch.full((20, 10240), 127, dtype=torch.int8)
    x, weight = (Quantized(v, torch.ones(len(v), 1), torch.float32) for v in (ends, -ends[:8]))
    assert int8.scaled_linear(x, weight).eq(-127 * 127 * 10240).all()
    assert int8.scaled_linear(Quantized(x.values[:0], x.scale[:0]), weight).shape == (0, 8)


def test_says_what_it_cannot_multiply():
    x, weight = (int8.quantize_rows(randn(n, 32, seed=n)) for n in (5, 24))
    for args, message in (
        ((x, int8.quantize_rows(randn(20, 32, seed=1))), r"multiples of 8, not \[20, 32\]"),
        ((x, int8.quantize_rows(randn(24, 20, seed=1))), r"multiples of 8, not \[24, 20\]"),
        ((int8.quantize_rows(randn(5, 16, seed=1)), weight), "x must have rows of 32"),
        ((x, weight, randn(32, seed=1)), r"bias must be \[24\], not \[32\]"),
    ):
        with pytest.raises(ValueError, match=message):
            int8.scaled_linear(*args)


@pytest.fixture(params=["auto", "reference"])
def ops(request):
    return registry.select(request.param, grad=False, rows="int8")


def same(found, like):
    """The rows that stand for `like`, the result of the op without int8."""
    rows = int8.quantize_rows(like)
    return torch.equal(found.values, rows.values) and torch.equal(found.scale, rows.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_producers(ops, dtype):
    x, f = (randn(2, 5, D, seed=s, dtype=dtype) for s in (1, 2))
    gate, scale, shift = (randn(2, 1, D, seed=s) for s in (3, 4, 5))
    found = ops.norm_modulate(x, scale, shift)
    like = reference.norm_modulate(x, scale, shift)
    torch.testing.assert_close(found.dequantize(), like.float(), rtol=0, atol=0.06)
    h, found = ops.gate_residual_norm(x, f, gate, scale, shift)
    h_like, like = reference.gate_residual_norm(x, f, gate, scale, shift)
    torch.testing.assert_close(h, h_like)
    torch.testing.assert_close(found.dequantize(), like.float(), rtol=0, atol=0.06)
    both = ops.norm_modulate(x, randn(2, 2, 1, D, seed=6), randn(2, 2, 1, D, seed=7))
    assert both.shape == (2, 2, 5, D) and both[1].dtype == dtype
    plain = registry.select("reference", grad=False, rows="int8")
    assert same(plain.swiglu(x, f), reference.swiglu(x, f))
    assert same(plain.gelu_tanh(x), reference.gelu_tanh(x))


def test_packed_linear_follows_its_weight_and_writes_where_it_is_told(ops):
    weight, bias, x = randn(32, D, seed=1), randn(32, seed=2), randn(2, 5, D, seed=3)
    linear = ops.pack_linear(weight, bias, [weight])
    found = linear(x)
    assert torch.equal(found, linear(int8.quantize_rows(x)))
    error = found - F.linear(x, weight, bias)
    assert error.square().mean() < 0.01**2 * D  # 0.7 % of each of D products of variance 1
    values = linear.quantized.values
    weight.mul_(2)
    torch.testing.assert_close(linear(x) - bias, 2 * (found - bias))
    assert linear.quantized.values is values
    rows = torch.zeros(2, 9, 32)
    linear(x, rows[:, 4:])
    assert torch.equal(rows[:, 4:], linear(x)) and not rows[:, :4].any()
    activated = ops.pack_linear(weight, bias, [weight], gelu=True)
    found, like = activated(x), F.gelu(linear(x), approximate="tanh")
    assert ((found.dequantize() - like).abs() <= 0.501 * found.scale).all()
    with pytest.raises(ValueError, match="out cannot receive activated rows"):
        activated(x, rows[:, 4:])


def test_select():
    ops, plain = (registry.select(grad=False, rows=rows) for rows in ("int8", None))
    for op in registry.OP_NAMES:
        assert (getattr(ops, op) is getattr(plain, op)) == (op not in registry.FP8_OPS)
    for settings, message in (
        ({"rows": "int8"}, "int8.*has no backward pass"),
        ({"rows": "int8", "grad": False, "device": "mps"}, "needs a CPU or a CUDA device"),
        ({"rows": "int4"}, r"rows='int4' is unknown; use one of \('fp8', 'int8'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.select(**settings)


def test_compiles_in_one_graph():
    weight = randn(32, D, seed=1)
    ops = registry.select("reference", grad=False, rows="int8")
    linear = ops.pack_linear(weight, None, [weight])

    def block(x):
        h, y = ops.gate_residual_norm(x, x)
        return h, linear(y), linear(x)

    x = randn(2, 5, D, seed=2)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for found, like in zip(compiled(x), block(x), strict=True):
        torch.testing.assert_close(found, like)


def test_the_library_gets_more_rows_than_cuda_asks_for(monkeypatch):
    rows, plain = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: rows.append(len(x)) or plain(x, w))
    weight = int8.quantize_rows(randn(16, 16, seed=1))
    for count in (1, 16, 17, 40):
        x = int8.quantize_rows(randn(count, 16, seed=2))
        assert int8.scaled_linear(x, weight).shape == (count, 16)
    assert min(rows) > 16


def test_an_update_of_any_source_is_seen():
    weight, x = randn(32, 48, seed=1), randn(2, 5, 48, seed=3)
    first, second = weight[:16].data, weight[16:].data  # each counts its own updates
    linear = int8.forms(None)["pack_linear"](weight, None, [first, second])
    first.mul_(1).mul_(1)
    before = linear(x)
    second.mul_(2)
    torch.testing.assert_close(linear(x)[..., 16:], 2 * before[..., 16:])
