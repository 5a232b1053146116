"""The reference ops against formulas written out in fp64, and the registry that binds them."""

import importlib
import math

import pytest
import tdm_kernels
import torch
from tdm_kernels import reference, registry
from tdm_kernels.__main__ import main

B, N, H, D = 2, 3, 8, 24
TOKENS = [1, 63, 77]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_norm(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def assert_near(actual, expected):
    assert actual.shape == expected.shape
    tolerance = 1e-5 if actual.dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def cast(dtype, *tensors):
    """Round to `dtype`, and return both the rounded tensors and their exact fp64 values."""
    rounded = [tensor.to(dtype) for tensor in tensors]
    return rounded, [tensor.double() for tensor in rounded]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_norm_modulate(num_tokens, dtype):
    inputs = (
        randn(B, num_tokens, D),
        randn(B, 1, D, seed=1),
        randn(B, 1, D, seed=2),
        randn(D, seed=3),
    )
    (x, scale, shift, weight), (x_, scale_, shift_, weight_) = cast(dtype, *inputs)
    assert_near(reference.norm_modulate(x), layer_norm(x_, 1e-6))
    assert_near(
        reference.norm_modulate(x, scale, shift, eps=1e-3), layer_norm(x_, 1e-3) * scale_ + shift_
    )
    assert_near(
        reference.norm_modulate(x, scale, weight_D=weight), rms_norm(x_, weight_, 1e-6) * scale_
    )


def test_norm_modulate_serves_two_modulations_of_one_norm():
    x, scale, shift = randn(B, 5, D), randn(2, B, 1, D, seed=1), randn(2, B, 1, D, seed=2)
    both = reference.norm_modulate(x, scale, shift)
    for out, s, t in zip(both, scale, shift, strict=True):
        assert torch.equal(out, reference.norm_modulate(x, s, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_gate_residual_norm(num_tokens, dtype):
    inputs = [randn(B, num_tokens, D), randn(B, num_tokens, D, seed=1)]
    inputs += [randn(B, 1, D, seed=seed) for seed in (2, 3, 4)] + [
        randn(D, seed=5),
        randn(D, seed=6),
    ]
    (x, f, gate, scale, shift, w1, w2), exact = cast(dtype, *inputs)
    x_, f_, gate_, scale_, shift_, w1_, w2_ = exact
    h, y = reference.gate_residual_norm(x, f, gate, scale, shift)
    assert_near(h, x_ + gate_ * f_)
    assert_near(y, layer_norm(h.double(), 1e-6) * scale_ + shift_)
    h, y = reference.gate_residual_norm(
        x, f, gate, scale, branch_weight_D=w1, weight_D=w2, eps=1e-5
    )
    assert_near(h, x_ + gate_ * rms_norm(f_, w1_, 1e-5))
    assert_near(y, rms_norm(h.double(), w2_, 1e-5) * scale_)
    assert_near(reference.gate_residual(x, f, branch_weight_D=w1), x_ + rms_norm(f_, w1_, 1e-6))


def rotation(angle):
    """Return the table `qk_norm_rope` takes for angles [B, T, H / 2]."""
    return torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)[..., None, :].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_qk_norm_rope(num_tokens, dtype):
    inputs = randn(B, num_tokens, N, H), randn(B, num_tokens, N, H, seed=1), randn(H, seed=2)
    (q, k, weight), (q_, k_, weight_) = cast(dtype, *inputs)
    angle = randn(1, num_tokens, H // 2, seed=3)
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None]

    def rotate(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    actual = reference.qk_norm_rope(q, k, weight, weight, rotation(angle))
    assert_near(actual[0], rotate(rms_norm(q_, weight_, 1e-6)))
    assert_near(actual[1], rotate(rms_norm(k_, weight_, 1e-6)))
    assert_near(reference.qk_norm_rope(q, k, None, None, rotation(angle))[0], rotate(q_))
    assert reference.qk_norm_rope(q, k)[0] is q


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(dtype):
    (x, up), (x_, up_) = cast(dtype, 3 * randn(B, 7, D), randn(B, 7, D, seed=1))
    assert_near(reference.swiglu(x, up), x_ / (1 + (-x_).exp()) * up_)
    inner = math.sqrt(2 / math.pi) * (x_ + 0.044715 * x_**3)
    assert_near(reference.gelu_tanh(x), 0.5 * x_ * (1 + inner.tanh()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths_dtype", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_joint_attention(num_tokens, lengths_dtype, dtype):
    shapes = [(B, num_tokens, N, H), (B, 11, N, H), (B, 11, N, H)]
    inputs = [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    (q, k, v), (q_, k_, v_) = cast(dtype, *inputs)
    logits = torch.einsum("btnh,bsnh->bnts", q_, k_) / math.sqrt(H)
    lengths = None
    if lengths_dtype is not None:
        lengths = torch.tensor([4, 11], dtype=lengths_dtype)
        logits[0, :, :, 4:] = -math.inf
    expected = torch.einsum("bnts,bsnh->btnh", logits.softmax(-1), v_).flatten(2)
    actual = reference.joint_attention(q, k, v, lengths)
    assert actual.dtype == dtype
    assert_near(actual, expected)


def test_solver_step():
    x, m_prev = (randn(2, 3, 4, 6, seed=seed, dtype=torch.float32) for seed in range(2))
    out = randn(2, 6, 12, seed=2, dtype=torch.float32)
    v = torch.empty_like(x)
    for y in range(4):
        for w in range(6):
            start = (y % 2 * 2 + w % 2) * 3
            v[:, :, y, w] = out[:, y // 2 * 3 + w // 2, start : start + 3]
    constants = {"sigma": 0.75, "c_x": 0.5, "c_m": 0.25}
    for sign in (1.0, -1.0):
        m = x - 0.75 * sign * v
        found = reference.solver_step(x, out, None, **constants, sign=sign, patch=2)
        torch.testing.assert_close(found, (0.5 * x + 0.25 * m, m))
        found = reference.solver_step(x, out, m_prev, **constants, c_prev=-2.0, sign=sign, patch=2)
        torch.testing.assert_close(found, (0.5 * x + 0.25 * m - 2 * m_prev, m))
    landed, m = reference.solver_step(x, out, None, sigma=0.5, c_x=0.0, c_m=1.0, patch=2)
    assert torch.equal(landed, m)


OPS = {
    "norm_modulate": lambda x, s: reference.norm_modulate(x, s, s, weight_D=s[0, 0]),
    "gate_residual_norm": lambda x, s: torch.cat(reference.gate_residual_norm(x, 2 * x, s, s, s)),
    "qk_norm_rope": lambda x, s: torch.cat(
        reference.qk_norm_rope(
            *x.unflatten(-1, (N, H)).chunk(2, 1),
            s[0, 0, :H],
            s[0, 0, :H],
            rotation(torch.ones(1, 2, 4)),
        )
    ),
    "swiglu": lambda x, s: reference.swiglu(x, x * s),
    "gelu_tanh": lambda x, s: reference.gelu_tanh(x * s),
    "joint_attention": lambda x, s: reference.joint_attention(
        *((x * scale).unflatten(-1, (N, H)) for scale in (s, 1 + s, 2 - s))
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_gradients(name):
    """fp32 ops against central differences, along a random direction of all inputs."""
    x, scale = randn(B, 4, D, dtype=torch.float32), randn(1, 1, D, seed=1, dtype=torch.float32)
    leaves = [x.requires_grad_(), scale.requires_grad_()]
    directions = [randn(*leaf.shape, seed=7, dtype=torch.float32) for leaf in leaves]
    out = OPS[name](*leaves)
    weights = randn(*out.shape, seed=9, dtype=torch.float32)
    (out * weights).sum().backward()
    exact = sum((leaf.grad * d).sum() for leaf, d in zip(leaves, directions, strict=True)).double()
    with torch.no_grad():
        step = 1e-3
        ends = [
            (
                OPS[name](*(p + sign * step * d for p, d in zip(leaves, directions, strict=True)))
                * weights
            )
            .double()
            .sum()
            for sign in (1, -1)
        ]
    torch.testing.assert_close(exact, (ends[0] - ends[1]) / (2 * step), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", OPS)
def test_strided_inputs_give_the_same_result(name):
    x, scale = randn(B, 4, D, dtype=torch.float32), randn(1, 1, D, seed=1, dtype=torch.float32)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(OPS[name](strided, scale), OPS[name](x, scale))


@pytest.mark.parametrize("magnitude", [1e-12, 1e18])
def test_norms_survive_extremes(magnitude):
    x = magnitude * randn(1, 3, D, dtype=torch.float32)
    assert reference.norm_modulate(x).isfinite().all()
    assert reference.norm_modulate(x, weight_D=torch.ones(D)).isfinite().all()


def test_select_binds_the_reference():
    ops = registry.select("reference")
    assert ops == registry.select("auto", "cpu", torch.float16, head_dim=128, grad=False)
    assert ops.joint_attention is reference.joint_attention
    assert set(registry.explain()) == {*registry.OP_NAMES, *registry.FP8_NAMES.values()}


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    with pytest.raises(ValueError, match="backend='cudnn' is unknown.*reference"):
        registry.select("cudnn")
    fast = registry.Impl(
        "swiglu",
        "fast",
        reference.gelu_tanh,
        lambda target: "needs CUDA" if target.device.type == "cpu" else "",
        grad=False,
    )
    monkeypatch.setattr(registry, "BACKENDS", ("fast", "reference"))
    monkeypatch.setattr(registry, "IMPLS", (fast, *registry.IMPLS))
    assert registry.select("auto").swiglu is reference.swiglu
    assert registry.explain(grad=False)["swiglu"] == {"fast": "needs CUDA", "reference": "ok"}
    with pytest.raises(ValueError, match="swiglu: fast has no backward pass"):
        registry.select("fast", grad=True)


def test_command_line_prints_every_op(capsys):
    assert main(["--dtype", "bf16", "--device", "cpu", "--no-grad"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ops = [*registry.OP_NAMES, *registry.FP8_NAMES.values()]
    assert [line.split()[0] for line in lines] == ops
    assert all("reference: ok" in line for line in lines)
    assert tdm_kernels.select is registry.select


@pytest.mark.parametrize("name", OPS)
def test_compiled_forms_agree_with_eager(name):
    """Some ops have another formula for compilers; the "eager" backend runs it uncompiled."""
    x, scale = randn(B, 4, D, dtype=torch.float32), randn(1, 1, D, seed=1, dtype=torch.float32)
    compiled = torch.compile(OPS[name], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, scale), OPS[name](x, scale))


def test_rows_of_the_tail_have_weights_of_their_own():
    q, k = (torch.randn(2, 7, 3, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    weights = [torch.rand(8, generator=torch.Generator().manual_seed(s)) for s in range(2, 6)]
    found = reference.qk_norm_rope(q, k, *weights[:2], tail=(5, *weights[2:]))
    for x, first, last, y in zip((q, k), weights[:2], weights[2:], found, strict=True):
        unit = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        torch.testing.assert_close(y[:, :5], unit[:, :5] * first)
        torch.testing.assert_close(y[:, 5:], unit[:, 5:] * last)


@pytest.mark.parametrize("module", ["tdm_kernels.reference", "tdm_kernels.linear"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gelu", [False, True])
def test_pack_linear_activates_and_writes_where_it_is_told(module, batch, gelu):
    x, weight, bias = torch.randn(batch, 5, 4), torch.randn(6, 4), torch.randn(6)
    linear = importlib.import_module(module).pack_linear(weight, bias, [weight], gelu=gelu)
    expected = torch.nn.functional.linear(x, weight, bias)
    if gelu:
        expected = torch.nn.functional.gelu(expected, approximate="tanh")
    torch.testing.assert_close(linear(x), expected)
    rows = torch.full((batch, 8, 6), float("nan"))
    found = linear(x, rows[:, 2:7])
    assert found.data_ptr() == rows[:, 2:7].data_ptr()
    torch.testing.assert_close(rows[:, 2:7], expected)
    assert rows[:, :2].isnan().all() and rows[:, 7:].isnan().all()


def test_two_branches_join_a_stream():
    x, branches = torch.randn(2, 5, 8), torch.randn(2, 2, 5, 8)
    gates = torch.randn(2, 2, 1, 8)
    found = reference.gate_residual(x, branches, gates)
    torch.testing.assert_close(found, x + gates[0] * branches[0] + gates[1] * branches[1])
