"""The Triton ops against the reference in fp64. Run by test_triton.py in a process of its own.

With TRITON_INTERPRET=1, read when a kernel is decorated, the kernels run on the CPU, in fp32 and
fp16 only (the interpreter's bf16 is not the hardware's). Without it they run on a CUDA device.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from tdm_kernels import attention, glu, norm, qk_norm_rope, reference, solver
from tdm_kernels.testing import ULP

from tests.kernels import compare as helpers
from tests.kernels.compare import assert_as_good, compare, run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
DTYPES = [torch.float32, HALF]
# dtype, B, T, D. The interpreter takes milliseconds per row: awkward sizes, but small ones.
SHORT = [(torch.float32, 3, 1, 24), (HALF, 2, 5, 40)]
LONG = [(torch.float32, 1, 77, 40), (HALF, 1, 63, 200)]
if not INTERPRETED:
    LONG += [(HALF, 2, 1000, 1536), (HALF, 1, 4224, 3840)]
# T, S, H, lengths: less than a tile, several, and whole ones.
ATTENTION = [(1, 63, 64, None), (77, 1, 16, None), (5, 77, 64, (1, 64, 77)), (63, 96, 128, None)]
if not INTERPRETED:
    ATTENTION += [(1000, 1000, 64, (1, 999, 512)), (300, 4429, 64, None), (128, 4224, 128, None)]


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Fill what is allocated and not written with NaN: an output the kernels skip shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, seed, dtype=torch.float32):
    return helpers.randn(*shape, seed=seed, dtype=dtype, device=DEVICE)


def inside_nan(x, pad=8):
    """The same values as a view into a larger buffer of NaN: reading past a row shows."""
    buffer = x.new_full([n + pad for n in x.shape], float("nan"))
    view = buffer[tuple(slice(n) for n in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize(("dtype", "b", "t", "d"), SHORT + LONG)
@pytest.mark.parametrize("weighted", [False, True])
def test_norm_modulate(dtype, b, t, d, weighted):
    x = inside_nan(randn(b, t, d, seed=1, dtype=dtype) * 3 + 1)
    options = {"weight_D": randn(d, seed=4)} if weighted else {}
    # One modulation for each sample, and one that all samples share, as a strided view.
    scale, shift = inside_nan(randn(2, b, 1, d, seed=2)).unbind()
    shared = inside_nan(randn(2, 1, 1, d, seed=3)).unbind()
    compare(norm, "norm_modulate", (x, scale, shift), options)
    if t < 10:
        compare(norm, "norm_modulate", (x, *shared), options)
        compare(norm, "norm_modulate", (x, shared[0]), options)
        compare(norm, "norm_modulate", (x,), {**options, "eps": 1e-3})


@pytest.mark.parametrize(("dtype", "b", "t", "d"), SHORT)
@pytest.mark.parametrize("weighted", [False, True])
def test_two_modulations_of_one_norm(dtype, b, t, d, weighted):
    vectors = randn(9, b, 1, d, seed=5)
    options = {"weight_D": randn(d, seed=4)} if weighted else {}
    x = randn(b, t, d, seed=1, dtype=dtype)
    compare(norm, "norm_modulate", (x, vectors[1:8:6], vectors[0:7:6]), options)
    compare(norm, "norm_modulate", (x, vectors[:2, :1], vectors[2:4, :1]), options)


@pytest.mark.parametrize(("dtype", "b", "t", "d"), SHORT + LONG)
@pytest.mark.parametrize("weighted", [False, True])
def test_gate_residual_and_norm(dtype, b, t, d, weighted):
    x = inside_nan(randn(b, t, d, seed=1, dtype=dtype))
    branch = inside_nan(randn(b, t, d, seed=2, dtype=dtype) * 2)
    gate, scale, shift = (randn(b, 1, d, seed=s) for s in (3, 4, 5))
    branch_weight = {"branch_weight_D": randn(d, seed=6)} if weighted else {}
    weights = {**branch_weight, "weight_D": randn(d, seed=7)} if weighted else {}
    compare(norm, "gate_residual_norm", (x, branch, gate, scale, shift), weights)
    if t < 10:
        compare(norm, "gate_residual", (x, branch, gate[:1]), branch_weight)
        compare(norm, "gate_residual", (x, branch), branch_weight)
        compare(norm, "gate_residual_norm", (x, branch, None, scale[:1]), weights)


def test_gradients_of_one_output_and_of_frozen_vectors():
    x, branch = randn(2, 3, 40, seed=1), randn(2, 3, 40, seed=2)
    vectors = [randn(1, 1, 40, seed=s) for s in (3, 4, 5)]
    weights = {"branch_weight_D": randn(40, seed=6), "weight_D": randn(40, seed=7)}
    sets = [vectors[0], *(randn(2, 2, 1, 40, seed=s) for s in (8, 9))]  # two of one norm
    for args, options in itertools.product((vectors, sets), ({}, weights)):
        for output in (0, 1):
            grads = []
            for module in (norm, reference):
                leaves = [t.detach().requires_grad_() for t in (x, branch)]
                result = module.gate_residual_norm(*leaves, *args, **options)
                grads.append(torch.autograd.grad(result[output].sum(), leaves))
            for found, like in zip(*grads, strict=True):
                torch.testing.assert_close(found, like, rtol=1e-4, atol=1e-5)


def test_two_branches_join_a_stream():
    x, branches = randn(2, 5, 40, seed=1, dtype=HALF), randn(2, 2, 5, 40, seed=2, dtype=HALF)
    table = randn(9, 2, 1, 40, seed=3)
    args = (x, branches, table[2:9:6], table[1], table[0])
    with torch.no_grad():
        found, like = (m.gate_residual_norm(*args) for m in (norm, reference))
    for a, b in zip(found, like, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    compare(norm, "gate_residual_norm", (x.float(), branches.float(), *args[2:]), {})
    with pytest.raises(ValueError, match="two gates"):
        norm.gate_residual_norm(x, branches, table[2])


def test_a_half_precision_branch_joins_an_fp32_stream():
    x = randn(2, 3, 40, seed=1)
    branch, gate = randn(2, 3, 40, seed=2, dtype=HALF), randn(1, 1, 40, seed=3, dtype=HALF)
    found, like = (run(m, "gate_residual_norm", (x, branch, gate), {}) for m in (norm, reference))
    for a, b in zip(found, like, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_rows_of_the_tail_have_weights_of_their_own():
    q, k = randn(2, 5, 3, 3, 16, seed=1, dtype=HALF).unbind(2)[:2]
    weights = [randn(16, seed=s) for s in range(2, 6)]
    tail = (3, *weights[2:])
    with torch.no_grad():
        found = qk_norm_rope.qk_norm_rope(q, k, *weights[:2], tail=tail)
        like = reference.qk_norm_rope(q, k, *weights[:2], tail=tail)
    for x, y in zip(found, like, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="both weights"):
        qk_norm_rope.qk_norm_rope(q, k, tail=tail)


def test_a_group_of_one_prompt_is_read_from_a_single_row():
    x = randn(4, 5, 24, seed=1)[:1].expand(4, -1, -1)
    found = norm.norm_modulate(x, randn(1, 1, 24, seed=2), randn(1, 1, 24, seed=3))
    assert found.isfinite().all() and (found == found[:1]).all()


def test_autocast_returns_what_the_next_linear_reads():
    x = randn(2, 3, 24, seed=1)
    with torch.autocast(DEVICE, HALF):
        y = norm.norm_modulate(x)
    like = reference.norm_modulate(x).to(HALF)
    torch.testing.assert_close(y, like, rtol=ULP[HALF], atol=0)


@pytest.mark.parametrize("magnitude", [1e-12, 1e18])
def test_norms_survive_extremes(magnitude):
    x = magnitude * randn(1, 3, 24, seed=1)
    assert norm.norm_modulate(x).isfinite().all()
    assert norm.norm_modulate(x, weight_D=randn(24, seed=2)).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "heads", "h"), [(3, 1, 1, 64), (2, 5, 10, 24), (1, 77, 3, 32)])
def test_qk_norm_rope(b, t, heads, h, dtype):
    packed = inside_nan(randn(b, t, 3, heads, h, seed=1, dtype=dtype) * 2)
    q, k = packed[:, :, 0], packed[:, :, 1]  # strided views, as the models' are
    weights = randn(h, seed=2), randn(h, seed=3)
    angle = randn(b, t, 1, h // 2, seed=4)
    rope = torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)
    compare(qk_norm_rope, "qk_norm_rope", (q, k, *weights), {"rope_BTNH": rope})
    if t != 77:
        compare(qk_norm_rope, "qk_norm_rope", (q, k, *weights), {})
        compare(qk_norm_rope, "qk_norm_rope", (q, k), {"rope_BTNH": rope[:1]})


def test_q_and_k_need_not_look_alike():
    q, k = randn(2, 5, 3, 24, seed=1), randn(2, 5, 2, 24, seed=2)
    weights = randn(24, seed=3), randn(24, seed=4)
    compare(qk_norm_rope, "qk_norm_rope", (q, k, *weights), {})
    out_q, out_k = qk_norm_rope.qk_norm_rope(q, k, None, weights[1])
    assert out_q is q
    torch.testing.assert_close(out_k, reference.qk_norm_rope(q, k, *weights)[1])
    assert qk_norm_rope.qk_norm_rope(q, k)[1] is k
    leaf = k.detach().requires_grad_()  # the gradient of one output alone
    found, like = (
        torch.autograd.grad(module.qk_norm_rope(k, leaf, *weights)[1].sum(), leaf)
        for module in (qk_norm_rope, reference)
    )
    torch.testing.assert_close(found, like, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1, 7), (1, 63, 40), (1, 2, 2100)])
def test_activations(shape, dtype):
    x = inside_nan(randn(*shape, seed=1, dtype=dtype) * 4)
    compare(glu, "gelu_tanh", (x,), {})
    packed = randn(*shape[:2], 2 * shape[2], seed=2, dtype=dtype)
    compare(glu, "swiglu", packed.chunk(2, -1), {})


def packed_qkv(b, t, s, heads, h, dtype):
    """Views of one packed projection, whose rows beyond t and s are NaN."""
    packed = inside_nan(randn(b, max(t, s), 3, heads, h, seed=1, dtype=dtype) * 2)
    packed[:, t:, 0], packed[:, s:, 1:] = torch.nan, torch.nan
    q, k, v = packed.unbind(2)
    return q[:, :t], k[:, :s], v[:, :s]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "s", "h", "lengths"), ATTENTION)
def test_joint_attention(t, s, h, lengths, dtype):
    q, k, v = packed_qkv(3, t, s, 2, h, dtype)
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    like = reference.joint_attention(q, k, v, lengths)
    logits = torch.einsum("btnh,bsnh->bnts", q.double(), k.double()) / h**0.5
    for b, length in enumerate([] if lengths is None else lengths.tolist()):
        logits[b, :, :, length:] = -torch.inf
    exact = torch.einsum("bnts,bsnh->btnh", logits.softmax(-1), v.double()).flatten(2)
    for b, length in enumerate([] if lengths is None else lengths.tolist()):
        k[b, length:], v[b, length:] = torch.nan, torch.nan
    found = attention.triton_attention(q, k, v, lengths)
    assert found.is_contiguous()
    assert_as_good(found, like, exact)
    assert_as_good(attention.joint_attention(q, k, v, lengths), like, exact)
    if lengths is not None:
        assert torch.equal(attention.triton_attention(q, k, v, lengths.int()), found)


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize(("t", "s", "h"), [c[:3] for c in ATTENTION if c[3] is None])
def test_attention_by_cudnn_alone(t, s, h, monkeypatch):
    q, k, v = packed_qkv(3, t, s, 2, h, HALF)
    if not attention._leaves_to_cudnn(q.device):
        pytest.skip(f"attention is not left to cuDNN on {torch.cuda.get_device_name()}")
    torch.use_deterministic_algorithms(False)  # with them PyTorch would choose another
    monkeypatch.setattr(attention, "_PREFERRED", attention._PREFERRED[:1])
    logits = torch.einsum("btnh,bsnh->bnts", q.double(), k.double()) / h**0.5
    exact = torch.einsum("bnts,bsnh->btnh", logits.softmax(-1), v.double()).flatten(2)
    found = attention.cudnn_attention(q, k, v)
    assert found.is_contiguous()
    assert_as_good(found, reference.joint_attention(q, k, v), exact)


def test_attention_of_any_strides():
    q, k, v = packed_qkv(2, 5, 33, 3, 16, torch.float32)
    found = attention.joint_attention(q, k, v)
    for order in ((1, 0, 2, 3), (2, 0, 1, 3), (3, 0, 1, 2)):
        back = [order.index(axis) for axis in range(4)]
        views = [x.permute(order).contiguous().permute(back) for x in (q, k, v)]
        assert torch.equal(attention.joint_attention(*views), found)
    shared = [x[:1].expand(2, -1, -1, -1) for x in (k, v)]  # one prompt's keys for its group
    assert torch.equal(
        attention.joint_attention(q, *shared),
        attention.joint_attention(q, *(x.contiguous() for x in shared)),
    )


def test_attention_survives_extremes():
    q, k, v = packed_qkv(1, 5, 40, 1, 16, torch.float32)
    found = attention.joint_attention(q * 1e9, k * 1e9, v)
    assert found.isfinite().all() and found.abs().max() <= v.abs().max()
    assert attention.joint_attention(q[:, :0], k, v).shape == (1, 0, 16)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_attention_leaves_gradients_to_the_library(which):
    inputs = [randn(2, 5, 3, 16, seed=seed) for seed in range(3)]
    inputs[which].requires_grad_()
    lengths = torch.tensor([2, 5], device=DEVICE)
    found, like = (
        torch.autograd.grad(module.joint_attention(*inputs, lengths).sum(), inputs[which])[0]
        for module in (attention, reference)
    )
    assert torch.equal(found, like)


SMALL = [(3, 3, 4, 6, 2), (1, 16, 2, 34, 2), (2, 5, 7, 9, 1)]  # B, C, h, w, patch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "c", "h", "w", "p"), SMALL)
def test_solver_step(b, c, h, w, p, dtype):
    x, m_prev = (inside_nan(randn(b, c, h, w, seed=seed)) for seed in (1, 2))
    out = inside_nan(randn(b, h * w // p**2, p * p * c, seed=3, dtype=dtype))
    for memory, c_prev in ((None, 0.0), (m_prev, -0.3)):
        constants = {"sigma": 0.7, "c_x": 0.6, "c_m": 0.4, "c_prev": c_prev}
        options = {"sign": -1.0, "patch": p}
        found, like = (
            module.solver_step(x, out, memory, **constants, **options)
            for module in (solver, reference)
        )
        v = -reference.unpatchify(out.double(), h, w, p)
        memory = None if memory is None else memory.double()
        for triple in zip(
            found, like, reference.advance(x.double(), v, memory, **constants), strict=True
        ):
            assert_as_good(*triple)
    found, m = solver.solver_step(x, out, None, sigma=0.7, c_x=0.0, c_m=1.0, patch=p)
    assert torch.equal(found, m)  # the last step lands on the prediction, bit for bit


def test_swiglu_gives_only_the_gradients_asked_for():
    gate, up = randn(1, 3, 24, seed=1).requires_grad_(), randn(1, 3, 24, seed=2)
    (found,) = torch.autograd.grad(glu.swiglu(gate, up).sum(), gate)
    (like,) = torch.autograd.grad(reference.swiglu(gate, up).sum(), gate)
    torch.testing.assert_close(found, like)


def test_activations_survive_extremes():
    x = torch.tensor([[[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e18, float("nan")]]])
    x, ones = x.to(DEVICE), torch.ones_like(x, device=DEVICE)
    like = torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(glu.gelu_tanh(x), like, equal_nan=True)
    found, like = glu.swiglu(x, ones), reference.swiglu(x, ones)
    torch.testing.assert_close(found, like, equal_nan=True, atol=1e-36, rtol=1e-5)


def test_empty_inputs():
    x = randn(2, 0, 24, seed=1).requires_grad_()
    y = norm.norm_modulate(x, randn(1, 1, 24, seed=2).requires_grad_())
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_refuses_what_the_kernels_cannot_read():
    x, q, r = randn(2, 5, 24, seed=1), randn(2, 5, 3, 24, seed=1), randn(2, 5, 3, 16, seed=1)
    step: dict = {"sigma": 0.5, "c_x": 0.5, "c_m": 0.5, "patch": 1}
    for call, message in (
        (lambda: norm.norm_modulate(x, randn(2, 5, 24, seed=2)), "scale must be"),
        (lambda: norm.norm_modulate(x, randn(3, 2, 1, 24, seed=2)), "scale must be"),
        (lambda: norm.norm_modulate(x, x[:, :1], randn(2, 2, 1, 24, seed=2)), "as many sets"),
        (lambda: norm.norm_modulate(x.double()), "x must be float32"),
        (lambda: norm.norm_modulate(q), "x must have 3 axes"),
        (lambda: norm.gate_residual(x, x[:, :4]), "branch must be"),
        (lambda: norm.gate_residual(x, x, randn(2, 2, 1, 24, seed=2)), "gate must be"),
        (lambda: norm.norm_modulate(x, weight_D=randn(31, seed=2)), r"weight must be \(24,\)"),
        (lambda: qk_norm_rope.qk_norm_rope(q, q, randn(3, seed=2)), r"weight_q must be \(24,\)"),
        (lambda: qk_norm_rope.qk_norm_rope(q, q, None, None, q[:, :, :1, :22]), "rope must be"),
        (lambda: glu.swiglu(x, x[..., :12]), "up must be"),
        (lambda: glu.gelu_tanh(x[0]), "x must have 3 axes"),
        (lambda: solver.solver_step(q, x, **step), r"out must be \[2, 72, 5\]"),
        (lambda: solver.solver_step(q, x, **{**step, "patch": 2}), "whole patches of 2"),
        (lambda: solver.solver_step(q.half(), x, **step), "x must be float32"),
        (lambda: solver.solver_step(q, x, q[:1], **step), "m_prev must be float32"),
        (lambda: attention.joint_attention(q, q, q), "heads must be one of .* wide, not 24"),
        (lambda: attention.joint_attention(x, x, x), "q must have 4 axes"),
        (lambda: attention.joint_attention(r, r[:, :, :2], r[:, :, :2]), r"k must be \[2, 1 or"),
        (lambda: attention.joint_attention(r, r[:, :0], r[:, :0]), r"k must be \[2, 1 or"),
        (lambda: attention.joint_attention(r, r, r[:, :4]), "v must be"),
        (lambda: attention.joint_attention(r, r, r.half()), "must share a dtype"),
        (lambda: attention.joint_attention(r, r, r, torch.ones(3)), "lengths must be 2 int32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
