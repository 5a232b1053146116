"""Recordings replay what the calls compute, follow their weights, and step aside elsewhere."""

import copy

import pytest
import torch
from tdm_kernels import native, panel_linear, reference
from torch.fx.experimental.proxy_tensor import make_fx

from tdm_r1.models.conditioning import Condition
from tdm_r1.models.loading import load_transformer
from tests.kernels.compare import randn

pytestmark = pytest.mark.skipif(bool(native.load()), reason=f"the native library {native.load()}")
recording = pytest.importorskip("tdm_kernels.recording")


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    """Every test runs on one thread and on a team of two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


class Layer:
    """A residual layer of native ops over a weight of its own."""

    def __init__(self):
        self.weight = randn(64, 64, seed=1)
        self.linear = panel_linear.pack_linear(self.weight, None, [self.weight])
        self.calls = 0

    def __call__(self, x, scale, shift=True):
        self.calls += 1
        y = native.norm_modulate(x, scale, scale if shift else None)
        q = self.linear(y).unflatten(-1, (2, 32))
        return native.gate_residual(x, native.joint_attention(q, q, q), scale)


def inputs(t=40, seed=2):
    return randn(1, t, 64, seed=seed), randn(1, 1, 64, seed=seed + 1)


def test_a_replay_is_the_call_bit_for_bit():
    layer = Layer()
    recorded = recording.record(layer, [layer.weight])
    expected = [layer(*inputs(t, seed)) for t in (40, 7) for seed in (2, 3, 4)]
    expected.append(layer(*inputs(), False))
    layer.calls = 0
    found = [recorded(*inputs(t, seed)) for t in (40, 7) for seed in (2, 3, 4)]
    found.append(recorded(*inputs(), False))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert layer.calls == 6  # two lengths and another value, each after a warm-up


def test_it_follows_the_weights_it_reads():
    layer = Layer()
    recorded = recording.record(layer, [layer.weight])
    before = recorded(*inputs())
    layer.weight.mul_(0.5)
    after = recorded(*inputs())
    assert torch.equal(after, layer(*inputs())) and not torch.equal(after, before)


def test_only_so_many_shapes_are_kept():
    recorded = recording.record(Layer(), [])
    for t in range(1, 12):
        recorded(*inputs(t))
    assert len(recorded.programs) == 8


def test_what_cannot_be_recorded_is_called():
    layer = Layer()
    recorded = recording.record(lambda x, scale: torch.sin(layer(x, scale)), [])
    for _ in range(2):
        assert torch.equal(recorded(*inputs()), torch.sin(layer(*inputs())))
    plain = recording.record(reference.gate_residual, [])
    x = inputs()[0]
    assert torch.equal(plain(x, x), x + x)


def test_inference_mode_records_nothing_else():
    layer = Layer()
    recorded = recording.record(layer, [])
    copying = recording.record(lambda x, scale: layer(x[:, ::2].contiguous(), scale), [])
    with torch.inference_mode():
        first = recorded(*inputs()), copying(*inputs())
        again = recorded(*inputs(seed=5)), copying(*inputs(seed=5))
    assert None not in recorded.programs.values() and set(copying.programs.values()) == {None}
    for seed, (whole, half) in ((2, first), (5, again)):
        x, scale = inputs(seed=seed)
        assert torch.equal(whole, layer(x, scale)) and torch.equal(half, layer(x[:, ::2], scale))
        assert torch.equal(recorded(x, scale), whole)


def test_gradients_large_inputs_and_other_dtypes_are_called():
    layer = Layer()
    recorded = recording.record(layer, [])
    x, scale = inputs()
    with torch.enable_grad():
        recorded(x.requires_grad_(), scale).sum().backward()
    assert x.grad is not None
    recorded(randn(1, 600, 64, seed=1), scale)
    with torch.autocast("cpu", torch.bfloat16):
        recorded(*inputs())
    assert not recorded.programs and layer.calls == 3


def test_an_error_ends_the_recording():
    def fails(x):
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            recording.record(fails, [])(inputs()[0])
    recorded = recording.record(Layer(), [])
    recorded(*inputs())


def test_a_program_that_is_gone_is_refused():
    with pytest.raises(RuntimeError, match="no program 123456"):
        native.native_op("replay")(123456, 1)
    with pytest.raises(RuntimeError, match="not recording"):
        native.native_op("recorded")()


@pytest.mark.parametrize("family", ["sd3", "zimage"])
def test_both_models_replay_what_they_compute(family, request):
    model = load_transformer(request.getfixturevalue(f"{family}_dir"), dtype=torch.float32).freeze()
    width = {"sd3": 64, "zimage": 48}[family]
    pooled = randn(1, 56, seed=3) if family == "sd3" else None
    cond = Condition(randn(1, 9, width, seed=4), torch.tensor([9]), pooled)
    x, t = randn(1, 16, 8, 8, seed=5), torch.tensor([700.0])
    expected = model.velocity(x, t, cond)
    names = set(model.recorded)
    assert names == set(model.recordable)
    assert all(None not in r.programs.values() and r.programs for r in model.recorded.values())
    assert torch.equal(model.velocity(x, t, cond), expected)
    recorded, model.recorded = model.recorded, {}
    assert torch.equal(model.velocity(x, t, cond), expected)
    model.recorded = recorded
    assert copy.deepcopy(model).recorded == {}
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("to_q.weight")).add_(0.1)
    changed = model.velocity(x, t, cond)
    assert not torch.equal(changed, expected)
    model.recorded = {}
    assert torch.equal(model.velocity(x, t, cond), changed)


def test_a_recording_that_is_dropped_leaves_nothing_in_what_is_being_traced():
    recorded = [recording.record(Layer(), [])]
    recorded[0](*inputs())
    (program,) = recorded[0].programs.values()
    number = program.number
    del program

    def traced(x):
        recorded.clear()  # as a search for garbage may, at any time
        return x + 1

    graph = make_fx(traced)(torch.ones(2)).graph
    assert not recorded and number in recording._unused
    assert all("tdm_kernels" not in str(node.target) for node in graph.nodes)
    recording.record(Layer(), [])(*inputs())
    assert number not in recording._unused
