"""The C++ ops against the reference in fp64: values, gradients, layouts, and what they refuse."""

import pytest
import torch
from tdm_kernels import (
    blocked_linear,
    conv,
    native,
    panel_linear,
    recording,
    reference,
    registry,
)
from tdm_kernels.blocked_linear import BlockedLinear
from tdm_kernels.registry import select
from tdm_kernels.testing import ULP, in_double

from tests.kernels.compare import assert_as_good, compare, randn

pytestmark = [
    pytest.mark.skipif(bool(native.load()), reason=f"the native library {native.load()}"),
    pytest.mark.usefixtures("instruction_set"),
]

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 1, 24), (3, 63, 192), (2, 77, 200), (1, 1000, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "d"), SIZES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_norm_modulate(b, t, d, dtype, weighted, shared):
    rows = 1 if shared else b
    x = randn(b, t, d, seed=1, dtype=dtype) * 3 + 1
    scale, shift = randn(rows, 1, d, seed=2), randn(rows, 1, d, seed=3)
    options = {"weight_D": randn(d, seed=4)} if weighted else {}
    compare(native, "norm_modulate", (x, scale, shift), options)
    compare(native, "norm_modulate", (x, scale), options)
    compare(native, "norm_modulate", (x,), {**options, "eps": 1e-3})
    pair = randn(2, rows, 1, d, seed=5), randn(2, rows, 1, d, seed=6)
    compare(native, "norm_modulate", (x, *pair), options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "d"), SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gate_residual_and_norm(b, t, d, dtype, weighted):
    x, branch = randn(b, t, d, seed=1, dtype=dtype), randn(b, t, d, seed=2, dtype=dtype) * 2
    gate, scale, shift = (randn(b, 1, d, seed=s) for s in (3, 4, 5))
    branch_weight = {"branch_weight_D": randn(d, seed=6)} if weighted else {}
    compare(native, "gate_residual", (x, branch, gate), branch_weight)
    compare(native, "gate_residual", (x, branch), branch_weight)
    weight = {"weight_D": randn(d, seed=7)} if weighted else {}
    compare(
        native, "gate_residual_norm", (x, branch, gate, scale, shift), {**branch_weight, **weight}
    )
    compare(native, "gate_residual_norm", (x, branch, None, scale), {**branch_weight, **weight})
    branches, gates = randn(2, b, t, d, seed=8, dtype=dtype), randn(2, b, 1, d, seed=9)
    compare(native, "gate_residual_norm", (x, branches, gates, scale, shift), weight)
    compare(native, "gate_residual", (x, branches, gates), {})


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sets", [(), (2,)])
def test_gradients_of_one_output(sets, weighted, output):
    x, branch, gate = randn(2, 5, 24, seed=1), randn(2, 5, 24, seed=2), randn(2, 1, 24, seed=3)
    modulation = randn(*sets, 2, 1, 24, seed=4), randn(*sets, 2, 1, 24, seed=5)
    weights = (randn(24, seed=6), randn(24, seed=7)) if weighted else ()
    grads = []
    for module in (native, reference):
        leaves = [t.detach().requires_grad_() for t in (x, branch, gate, *modulation, *weights)]
        options = dict(zip(("branch_weight_D", "weight_D"), leaves[5:], strict=False))
        out = module.gate_residual_norm(*leaves[:5], **options)[output]
        grads.append(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))
    for found, like in zip(*grads, strict=True):
        assert (found is None) == (like is None)
        if found is not None:
            torch.testing.assert_close(found, like, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "heads", "h"), [(1, 1, 1, 64), (3, 63, 3, 64), (2, 77, 2, 128)])
def test_qk_norm_rope(b, t, heads, h, dtype):
    packed = randn(b, t, 3, heads, h, seed=1, dtype=dtype) * 2  # strided views, as the models' are
    q, k = packed[:, :, 0], packed[:, :, 1]
    weights = randn(h, seed=2), randn(h, seed=3)
    compare(native, "qk_norm_rope", (q, k, *weights), {})
    angle = randn(b, t, 1, h // 2, seed=4)
    rope = torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)
    for table in (rope, rope[:1]):
        compare(native, "qk_norm_rope", (q, k, *weights), {"rope_BTNH": table})
        compare(native, "qk_norm_rope", (q, k), {"rope_BTNH": table})
    assert native.qk_norm_rope(q, k)[0] is q


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 63, 192), (2, 1000, 33)])
def test_activations(shape, dtype):
    x, up = randn(*shape, seed=1, dtype=dtype) * 4, randn(*shape, seed=2, dtype=dtype)
    compare(native, "gelu_tanh", (x,), {})
    compare(native, "swiglu", (x, up), {})


def test_activations_survive_extremes():
    x = torch.tensor([[[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e18, float("nan")]]])
    found, like = native.gelu_tanh(x), reference.gelu_tanh(x.requires_grad_()).detach()
    torch.testing.assert_close(found, like, equal_nan=True)
    found, like = native.swiglu(x, torch.ones_like(x)), reference.swiglu(x, torch.ones_like(x))
    torch.testing.assert_close(found, like, equal_nan=True, atol=1e-36, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "s", "h"), [(1, 1, 64), (16, 40, 64), (63, 77, 128), (5, 1000, 24)])
def test_joint_attention(t, s, h, dtype):
    q = randn(2, t, 3, h, seed=1, dtype=dtype)
    k, v = randn(2, s, 2, 3, h, seed=2, dtype=dtype).unbind(2)
    with torch.no_grad():
        found, like = native.joint_attention(q, k, v), reference.joint_attention(q, k, v)
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(x.double().transpose(1, 2) for x in (q, k, v))
        )
    assert_as_good(found, like, exact.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_attention_reads_no_key_beyond_a_length(dtype):
    q = randn(3, 5, 2, 24, seed=1, dtype=dtype)
    k, v = randn(3, 40, 2, 2, 24, seed=2, dtype=dtype).unbind(2)
    lengths = torch.tensor([1, 40, 17], dtype=torch.int32)
    with torch.no_grad():
        expected = [
            native.joint_attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n])
            for b, n in enumerate(lengths.tolist())
        ]
        for b, n in enumerate(lengths.tolist()):
            k[b, n:], v[b, n:] = torch.nan, torch.nan
        assert torch.equal(native.joint_attention(q, k, v, lengths), torch.cat(expected))


def attention_grads(module, inputs, dout, lengths=None):
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(module.joint_attention(*leaves, lengths), leaves, dout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("t", "s", "h"), [(1, 1, 64), (16, 40, 64), (63, 77, 128), (5, 256, 24), (257, 3, 8)]
)
def test_joint_attention_gradients(t, s, h, dtype):
    q = randn(2, t, 3, h, seed=1, dtype=dtype)
    k, v = randn(2, s, 2, 3, h, seed=2, dtype=dtype).unbind(2)
    dout = randn(2, t, 3 * h, seed=3, dtype=dtype)
    found, like = (attention_grads(module, (q, k, v), dout) for module in (native, reference))
    with in_double():
        exact = attention_grads(reference, [x.double() for x in (q, k, v)], dout.double())
    for mine, theirs, true in zip(found, like, exact, strict=True):
        assert mine.dtype == dtype
        assert_as_good(mine, theirs, true)


def test_joint_attention_has_no_gradient_beyond_a_length():
    inputs = [randn(3, 40, 2, 24, seed=seed) for seed in range(3)]
    lengths, dout = torch.tensor([1, 40, 17]), randn(3, 40, 48, seed=4)
    found, like = (attention_grads(m, inputs, dout, lengths) for m in (native, reference))
    torch.testing.assert_close(found, like)
    for grad in found[1:]:
        assert not grad[0, 1:].any() and not grad[2, 17:].any() and grad[2, :17].all()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_joint_attention_keeps_the_gradient_of_each_input(which):
    inputs = [randn(2, 5, 3, 32, seed=seed) for seed in range(3)]
    inputs[which].requires_grad_()
    found, like = (
        torch.autograd.grad(module.joint_attention(*inputs).square().sum(), inputs[which])[0]
        for module in (native, reference)
    )
    torch.testing.assert_close(found, like)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (16, 192, 768), (77, 45, 33), (130, 96, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_pack_linear(m, n, k, biased):
    x, weight = randn(2, m, k, seed=1), randn(n, k, seed=2)
    bias = randn(n, seed=3) if biased else None
    linear = panel_linear.pack_linear(weight, bias, [weight])
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert isinstance(linear, panel_linear.PanelLinear)
    assert_as_good(linear(x), torch.nn.functional.linear(x, weight, bias), expected)
    strided = torch.cat([x, x], dim=-1)[..., :k]
    assert torch.equal(linear(strided), linear(x))
    weight.zero_()  # panels follow an in-place update
    assert torch.equal(linear(x), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("b", "t", "n"), [(1, 16, 64), (3, 9, 45), (2, 24, 96)])
def test_pack_linear_activates_and_writes_where_it_is_told(b, t, n, gelu):
    x, weight, bias = randn(b, t, 40, seed=1), randn(n, 40, seed=2), randn(n, seed=3)
    linear, plain = (m.pack_linear(weight, bias, [], gelu=gelu) for m in (panel_linear, reference))
    exact = reference.pack_linear(weight.double(), bias.double(), [], gelu=gelu)(x.double())
    assert_as_good(linear(x), plain(x), exact)
    rows = torch.full((b, t + 5, n), float("nan"))
    assert linear(x, rows[:, 2 : t + 2]) is not None
    assert torch.equal(rows[:, 2 : t + 2], linear(x))
    assert rows[:, :2].isnan().all() and rows[:, t + 2 :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_tail_have_weights_of_their_own(dtype):
    q, k = randn(2, 21, 3, 3, 64, seed=1, dtype=dtype).unbind(2)[:2]
    weights = [randn(64, seed=s) for s in range(2, 6)]
    tail = (16, *weights[2:])
    with torch.no_grad():
        found = native.qk_norm_rope(q, k, *weights[:2], tail=tail)
        like = reference.qk_norm_rope(q, k, *weights[:2], tail=tail)
    for x, y in zip(found, like, strict=True):
        torch.testing.assert_close(x, y, rtol=2 * ULP[dtype], atol=2 * ULP[dtype])


def test_pack_linear_leaves_half_precision_to_the_library():
    x, weight = randn(3, 32, seed=1), randn(16, 32, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = panel_linear.pack_linear(weight, None, [weight])(x)
        assert torch.equal(found, torch.nn.functional.linear(x, weight))
    half = panel_linear.pack_linear(weight.half(), None, [weight])
    assert not isinstance(half, (panel_linear.PanelLinear, BlockedLinear))


@pytest.mark.skipif(not blocked_linear.available(), reason="oneDNN multiplies no bf16 here")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 8), (24, 768, 192), (77, 45, 33)])
def test_pack_linear_in_bf16_rounds_once(m, n, k, gelu):
    x, weight, bias = (randn(*shape, seed=s).bfloat16() for s, shape in
                       enumerate([(2, m, k), (n, k), (n,)]))  # fmt: skip
    linear, plain = (
        p.pack_linear(weight, bias, [weight], gelu=gelu) for p in (panel_linear, reference)
    )
    assert isinstance(linear, BlockedLinear)
    exact = plain_product(x, weight, bias, gelu)
    with torch.no_grad():
        assert_as_good(linear(x), plain(x), exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(linear(x.float()), linear(x))
        strided = torch.cat([x, x], dim=-1)[..., :k]
        assert torch.equal(linear(strided), linear(x))
        rows = torch.full((2, m + 2, n), float("nan"), dtype=torch.bfloat16)
        linear(x, rows[:, 1:-1])
        assert torch.equal(rows[:, 1:-1], linear(x)) and rows[:, 0].isnan().all()
        with pytest.raises(RuntimeError):
            linear(x.float())  # as F.linear refuses it
        weight.mul_(0.5)  # the reordered weight follows an in-place update
        assert_as_good(linear(x), plain(x), plain_product(x, weight, bias, gelu))


def plain_product(x, weight, bias, gelu):
    y = x.double() @ weight.double().T + bias.double()
    return torch.nn.functional.gelu(y, approximate="tanh") if gelu else y


def test_weights_made_in_inference_mode_are_read():
    x, image = randn(1, 5, 24, seed=1), randn(1, 4, 4, 8, seed=2)
    half = torch.bfloat16 if blocked_linear.available() else torch.float32
    with torch.inference_mode():
        weight, kernel = randn(48, 24, seed=3), randn(8, 8, 3, 3, seed=4)
        linear = panel_linear.pack_linear(weight, None, [weight])
        blocked = panel_linear.pack_linear(weight.to(half), None, [weight])
        exact = select("auto", "cpu", grad=False, rows="int8").pack_linear(weight, None, [weight])
        convolution = conv.pack_conv(kernel, None, [kernel])
        recorded = recording.record(linear, [weight])
    y, z = x @ weight.T, torch.nn.functional.conv2d(image.movedim(3, 1), kernel, padding=1)
    for _ in range(2):
        torch.testing.assert_close(linear(x), y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(convolution(image), z.movedim(1, 3), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(blocked(x.to(half)).float(), y, rtol=0.05, atol=0.1)
        torch.testing.assert_close(exact(x), y, rtol=0.05, atol=0.2)
        with torch.no_grad():
            assert torch.equal(recorded(x), linear(x))


def test_a_group_of_one_prompt_is_read_from_a_single_row():
    x = randn(4, 9, 32, seed=1)[:1].expand(4, -1, -1)
    found = native.norm_modulate(x, randn(1, 1, 32, seed=2), randn(1, 1, 32, seed=3))
    assert (found == found[:1]).all()


def test_autocast_returns_what_the_next_linear_reads():
    x = randn(2, 5, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = native.norm_modulate(x)
    torch.testing.assert_close(y, reference.norm_modulate(x).bfloat16(), rtol=0, atol=0)


def test_refuses_what_the_kernels_cannot_read():
    x, q = randn(2, 5, 32, seed=1), randn(2, 5, 3, 8, seed=1)
    for call, message in (
        (lambda: native.norm_modulate(x, randn(2, 5, 32, seed=2)), "scale must be"),
        (lambda: native.norm_modulate(x.half()), "float32 or bfloat16"),
        (lambda: native.gate_residual(x, x[:, :4]), "branch must be"),
        (lambda: native.norm_modulate(x, weight_D=randn(31, seed=2)), "weight must be 32"),
        (lambda: native.joint_attention(q, q, q, torch.tensor([5])), "lengths must be 2"),
        (lambda: native.joint_attention(q, q, q, torch.tensor([5, 6])), "must be 1 to 5, not 6"),
        (lambda: native.joint_attention(q, q, q, torch.tensor([0, 5])), "must be 1 to 5, not 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_auto_takes_native_on_a_cpu_and_explains_elsewhere():
    ops = select("auto", "cpu", torch.float32)
    assert ops.norm_modulate is native.norm_modulate
    assert ops.solver_step is reference.solver_step
    assert select("auto", "cpu", torch.float16).gelu_tanh is reference.gelu_tanh
    table = registry.explain("cuda", torch.bfloat16)
    assert table["swiglu"]["native"] == "runs on a CPU only"
    with pytest.raises(ValueError, match="not in torch.float16"):
        select("native", "cpu", torch.float16)


def test_an_instruction_set_is_chosen_by_name(instruction_set):
    assert native.instruction_set() == instruction_set
    with pytest.raises(RuntimeError, match="instruction set sse9 is not available"):
        native.use_instruction_set("sse9")
