"""The C++ ops for CUDA against the reference in fp64, on a GPU and, emulated, on a CPU.

Emulated, the kernels' own source runs: what it computes, reads and writes, which barriers it needs,
which accesses must be aligned. What only a GPU shows is its rounding of rsqrt and fused products.
"""

from types import SimpleNamespace

import pytest
import torch
from tdm_kernels import native, native_cuda, reference

from tests.kernels import compare as helpers
from tests.kernels import cuda_on_cpu
from tests.kernels.compare import assert_as_good

no_gpu = not torch.cuda.is_available()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(no_gpu, reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if not cuda_on_cpu.COMPILER:
        pytest.skip("needs a C++ compiler")
    cuda_on_cpu.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=on_gpu)])
def kit(request, monkeypatch):
    """Where the ops are, and what makes and checks their inputs. Fresh buffers are full of NaN."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        monkeypatch.setattr(native, "native_op", cuda_on_cpu.op)
        kit = Kit(cuda_on_cpu.ops(), "cpu", cuda_on_cpu.op)
    else:
        reason = native_cuda.load(torch.device("cuda"))
        if reason:
            pytest.skip(f"the native library {reason}")
        kit = Kit(cuda_on_cpu.ops(), "cuda", native.native_op)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=kit.device).isnan().all()
    yield kit
    torch.use_deterministic_algorithms(False)


class Kit(SimpleNamespace):
    def __init__(self, ops, device, op):
        super().__init__(ops=ops, device=device, op=op)

    def randn(self, *shape, seed, dtype=torch.float32):
        return helpers.randn(*shape, seed=seed, dtype=dtype, device=self.device)

    def compare(self, op, inputs, options):
        helpers.compare(self.ops, op, inputs, options, grad=False)


def inside_nan(x, pad):
    """The same values as a view into a larger buffer of NaN: reading past a row shows."""
    view = x.new_full([n + pad for n in x.shape], float("nan"))[tuple(slice(n) for n in x.shape)]
    return view.copy_(x)


# B, T, D and the padding of rows: 8 keeps them at 16 bytes where D does, 1 and 3 do not.
SIZES = [(1, 1, 24, 8), (3, 7, 192, 8), (2, 3, 192, 1), (2, 3, 33, 8), (1, 2, 1, 3)]
SIZES += [(1, 2, 1536, 8), (1, 2, 3840, 8), (1, 1, 8192, 8)]
if not no_gpu:
    SIZES += [(2, 1000, 1536, 8), (1, 4224, 3840, 8), (1, 77, 3840, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "d", "pad"), SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_norm_modulate(kit, b, t, d, pad, dtype, weighted):
    x = inside_nan(kit.randn(b, t, d, seed=1, dtype=dtype) * 3 + 1, pad)
    options = {"weight_D": kit.randn(d, seed=4, dtype=dtype)} if weighted else {}
    scale, shift = inside_nan(kit.randn(2, b, 1, d, seed=2), pad).unbind()
    kit.compare("norm_modulate", (x, scale, shift), options)
    if d > 200:
        return
    shared = inside_nan(kit.randn(2, 1, 1, d, seed=3, dtype=dtype), pad).unbind()
    kit.compare("norm_modulate", (x, *shared), options)
    kit.compare("norm_modulate", (x, shared[0]), options)
    kit.compare("norm_modulate", (x,), {**options, "eps": 1e-3})
    sets = kit.randn(9, b, 1, d, seed=5)
    kit.compare("norm_modulate", (x, sets[1:8:6], sets[0:7:6]), options)
    kit.compare("norm_modulate", (x, sets[:2, :1], sets[2:4, :1]), options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "d", "pad"), SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gate_residual_and_norm(kit, b, t, d, pad, dtype, weighted):
    x = inside_nan(kit.randn(b, t, d, seed=1, dtype=dtype), pad)
    branch = inside_nan(kit.randn(b, t, d, seed=2, dtype=dtype) * 2, pad)
    gate, scale, shift = (kit.randn(b, 1, d, seed=s) for s in (3, 4, 5))
    branch_weight = {"branch_weight_D": kit.randn(d, seed=6, dtype=dtype)} if weighted else {}
    weights = {**branch_weight, "weight_D": kit.randn(d, seed=7, dtype=dtype)} if weighted else {}
    kit.compare("gate_residual_norm", (x, branch, gate, scale, shift), weights)
    if d > 200:
        return
    kit.compare("gate_residual", (x, branch, gate[:1]), branch_weight)
    kit.compare("gate_residual", (x, branch), branch_weight)
    kit.compare("gate_residual_norm", (x, branch, None, scale[:1]), weights)


def test_the_norm_reads_h_as_it_is_stored(kit):
    x, branch, scale = (kit.randn(2, 3, 40, seed=s, dtype=torch.bfloat16) for s in (1, 2, 3))
    h, y = kit.ops.gate_residual_norm(x, branch, None, scale[:1, :1])
    assert torch.equal(y, kit.ops.norm_modulate(h, scale[:1, :1]))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_half_precision_branch_joins_an_fp32_stream(kit, half):
    x, branch = kit.randn(2, 3, 40, seed=1), kit.randn(2, 3, 40, seed=2, dtype=half)
    gate = kit.randn(1, 1, 40, seed=3, dtype=half)
    found, like = (m.gate_residual_norm(x, branch, gate) for m in (kit.ops, reference))
    for a, b in zip(found, like, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "t", "heads", "h", "pad"),
    [(3, 1, 1, 64, 8), (2, 3, 24, 64, 8), (1, 3, 30, 128, 8), (2, 2, 3, 256, 8), (2, 5, 10, 24, 8)]
    + [(2, 3, 5, 64, 1), (1, 2, 3, 6, 2), (2, 2, 7, 130, 8), (1, 1, 70, 2, 0)],
)
def test_qk_norm_rope(kit, b, t, heads, h, pad, dtype):
    packed = inside_nan(kit.randn(b, t, 3, heads, h, seed=1, dtype=dtype) * 2, pad)
    q, k = packed[:, :, 0], packed[:, :, 1]  # strided views, as the models' are
    weights = kit.randn(h, seed=2, dtype=dtype), kit.randn(h, seed=3, dtype=dtype)
    angle = kit.randn(b, t, 1, h // 2, seed=4)
    rope = torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)
    kit.compare("qk_norm_rope", (q, k, *weights), {"rope_BTNH": rope})
    kit.compare("qk_norm_rope", (q, k, *weights), {"rope_BTNH": rope[:1]})
    kit.compare("qk_norm_rope", (q, k, *weights), {})
    kit.compare("qk_norm_rope", (q, k), {"rope_BTNH": rope})


def test_q_and_k_need_not_look_alike(kit):
    q, k = kit.randn(2, 5, 3, 24, seed=1), kit.randn(2, 5, 2, 24, seed=2)
    weights = kit.randn(24, seed=3), kit.randn(24, seed=4)
    kit.compare("qk_norm_rope", (q, k, *weights), {})
    kit.compare("qk_norm_rope", (q, k[:, :4], *weights), {})
    out_q, out_k = kit.ops.qk_norm_rope(q, k, None, weights[1])
    assert out_q is q and kit.ops.qk_norm_rope(q, k)[1] is k
    torch.testing.assert_close(out_k, reference.qk_norm_rope(q, k, *weights)[1])


def test_rows_of_the_tail_have_weights_of_their_own(kit):
    q, k = kit.randn(2, 5, 3, 3, 24, seed=1).unbind(2)[:2]
    weights = [kit.randn(24, seed=s) for s in range(2, 6)]
    tail = (3, *weights[2:])
    with torch.no_grad():
        found, like = (m.qk_norm_rope(q, k, *weights[:2], tail=tail) for m in (kit.ops, reference))
    for a, b in zip(found, like, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("d", "pad"), [(40, 8), (33, 3)])
def test_writes_nothing_but_the_rows(kit, d, pad):
    x = kit.randn(2, 3, d, seed=1)
    buffers = [torch.full((2, 3, d + pad), 7.0, device=kit.device) for _ in range(2)]
    h, y = (buffer[..., :d] for buffer in buffers)
    kit.op("residual_norm")(x, x, None, None, None, None, None, 1e-6, h, y, None)
    assert_as_good(h, 2 * x, 2 * x.double())
    heads = torch.full((2, 3, 5, d + pad), 7.0, device=kit.device)
    q, weight = kit.randn(2, 3, 5, d, seed=2), kit.randn(d, seed=3)
    out = heads[..., :d]
    kit.op("head_norms")(q, None, weight, None, None, 1e-6, out, None)
    torch.testing.assert_close(out, reference.qk_norm_rope(q, q, weight)[0])
    for buffer in (*buffers, heads):
        assert (buffer[..., d:] == 7).all()


@pytest.mark.parametrize("magnitude", [1e-12, 1e18])
def test_norms_survive_extremes(kit, magnitude):
    x = magnitude * kit.randn(1, 3, 24, seed=1)
    assert kit.ops.norm_modulate(x).isfinite().all()
    assert kit.ops.norm_modulate(x, weight_D=kit.randn(24, seed=2)).isfinite().all()


def test_nan_and_infinity_pass_through(kit):
    for dtype in DTYPES:
        x = torch.tensor([[[1.0, float("nan"), float("inf"), -float("inf")] * 6]], dtype=dtype)
        x = x.to(kit.device)
        zero = torch.zeros_like(x)
        torch.testing.assert_close(kit.ops.gate_residual(x, zero), x, equal_nan=True)


def test_empty_inputs(kit):
    assert kit.ops.norm_modulate(kit.randn(2, 0, 24, seed=1)).shape == (2, 0, 24)
    q = kit.randn(2, 0, 3, 24, seed=1)
    assert kit.ops.qk_norm_rope(q, q, kit.randn(24, seed=2))[0].shape == q.shape


def test_refuses_what_the_kernels_cannot_read(kit):
    x, q = kit.randn(2, 5, 24, seed=1), kit.randn(2, 5, 3, 24, seed=1)
    leaf = x.clone().requires_grad_()
    for call, message in (
        (lambda: kit.ops.norm_modulate(x, kit.randn(2, 5, 24, seed=2)), "scale must be"),
        (lambda: kit.ops.norm_modulate(x.double()), "float32, bfloat16 or float16"),
        (lambda: kit.ops.norm_modulate(q), r"x must be \[B, T, D\]"),
        (lambda: kit.ops.gate_residual(x, x[:, :4]), "branch must be"),
        (lambda: kit.ops.norm_modulate(x, weight_D=kit.randn(31, seed=2)), "weight must be 24"),
        (lambda: kit.ops.norm_modulate(kit.randn(1, 1, 8193, seed=1)), "at most 8192 wide"),
        (lambda: kit.ops.qk_norm_rope(q, q, kit.randn(3, seed=2)), "weight must be 24"),
        (lambda: kit.ops.qk_norm_rope(q, q, None, None, q[:, :, :1, :22]), "rope must be"),
        (lambda: kit.ops.qk_norm_rope(*[kit.randn(1, 1, 1, 258, seed=1)] * 4), "at most 256 wide"),
        (lambda: kit.ops.norm_modulate(leaf), "have no backward pass"),
        (lambda: kit.ops.qk_norm_rope(leaf[:, :, None], leaf[:, :, None]), "no backward pass"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="needs a CUDA device")
def test_refuses_tensors_of_another_device():
    if reason := native_cuda.load(torch.device("cuda")):
        pytest.skip(f"the native library {reason}")
    x = torch.randn(2, 5, 24, device="cuda")
    with pytest.raises(RuntimeError, match="on the device of the first"):
        native.norm_modulate(x, weight_D=torch.ones(24))
