"""A pool replays what the calls compute, keeps its results apart, and says what it cannot do."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from tdm_r1.errors import ConfigError, DeviceError, GraphError
from tdm_r1.graphs import CudaGraphs, FakeGraphs, GraphPool, device_errors, graph_pool, tensors_in

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass(frozen=True)
class Pair:
    left: Tensor
    right: Tensor | None
    times: int


@pytest.fixture(params=["fake", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
def device(request):
    return torch.device("cpu" if request.param == "fake" else "cuda")


@pytest.fixture
def pool(device):
    return GraphPool(FakeGraphs() if device.type == "cpu" else CudaGraphs(device), capacity=3)


def work(weight: Tensor, x: Tensor, pair: Pair, bias: float) -> tuple[Tensor, Pair]:
    y = x @ weight * pair.times + bias
    return y, Pair(y.sum(0), None if pair.right is None else pair.right - y[0], 7)


def inputs(device, rows: int = 3, seed: int = 0, times: int = 2, right: bool = True):
    generator = torch.Generator().manual_seed(seed)
    x, left, other = (
        torch.randn(shape, generator=generator).to(device) for shape in ((rows, 4), (4,), (4,))
    )
    return x, Pair(left, other if right else None, times), 0.5


def assert_equal(found, like):
    pairs = list(zip(tensors_in(found), tensors_in(like), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)


def test_replays_are_the_call_bit_for_bit(pool, device):
    call = partial(work, torch.randn(4, 4).to(device))
    kinds = [{}, {"rows": 5}, {"right": False}]
    kept = []
    for seed in range(3):
        for kind in kinds:
            args = inputs(device, seed=seed, **kind)
            found = pool.run("work", call, *args)
            assert isinstance(found[1], Pair) and found[1].times == 7
            kept.append((found, call(*args)))
    for found, like in kept:  # a later replay must not have written over an earlier result
        assert_equal(found, like)
    assert len(pool.graphs) == len(kinds)


def test_names_and_values_are_part_of_the_key(pool, device):
    call = partial(work, torch.eye(4, device=device))
    args = inputs(device)
    assert_equal(pool.run("a", call, *args), call(*args))
    other = inputs(device, times=3)
    assert_equal(pool.run("a", call, *other), call(*other))
    doubled = pool.run("b", lambda x, pair, bias: x * 2, *args)
    assert torch.equal(doubled, args[0] * 2) and len(pool.graphs) == 3


def test_the_graphs_used_last_are_kept(pool, device):
    call = partial(work, torch.eye(4, device=device))
    for rows in (1, 2, 3, 1, 4):
        pool.run("work", call, *inputs(device, rows=rows))
    kept = {key[1][0][0][0] for key in pool.graphs}
    assert kept == {3, 1, 4}


def test_it_reads_weights_where_they_lie(pool, device):
    weight = torch.randn(4, 4).to(device)
    args, call = inputs(device), partial(work, weight)
    before = pool.run("work", call, *args)[0]
    weight.mul_(2)
    after = pool.run("work", call, *args)[0]
    assert_equal(after, work(weight, *args)[0])
    assert not torch.equal(before, after)


def test_results_are_ordinary_inside_and_outside_of_inference_mode(pool, device):
    call, args = partial(work, torch.eye(4, device=device)), inputs(device)
    with torch.inference_mode():
        pool.run("work", call, *inputs(device))
    found = pool.run("work", call, *args)[0]
    found.requires_grad_().sum().backward()
    assert found.grad is not None


def test_strict_pools_replay_only_what_was_warmed_up(device, pool):
    pool.strict = True
    call, args = partial(work, torch.eye(4, device=device)), inputs(device)
    with pytest.raises(GraphError, match=r"warmed up for work of \[3, 4\], \[4\].*call warmup"):
        pool.run("work", call, *args)
    with pool.warming():
        pool.run("work", call, *args)
    assert_equal(pool.run("work", call, *args), call(*args))
    with pytest.raises(GraphError, match=r"\[5, 4\]"):
        pool.run("work", call, *inputs(device, rows=5))


class TestFake:
    """What the stand-in forgives no more than a device does."""

    def test_outputs_that_are_not_copied_out_are_spoiled(self):
        fake = FakeGraphs()
        x = torch.ones(2)
        first, second = fake.capture(lambda: x + 1), fake.capture(lambda: x.int() + 2)
        assert first.outputs.isnan().all()  # nothing ran yet
        first.replay()
        assert torch.equal(first.outputs, x + 1)
        second.replay()
        assert first.outputs.isnan().all() and second.outputs.tolist() == [3, 3]

    def test_inputs_that_are_not_copied_in_go_unseen(self):
        x = torch.ones(2)
        buffer = x.clone()
        graph = FakeGraphs().capture(lambda: buffer + 1)
        x.fill_(5)
        graph.replay()
        assert graph.outputs.tolist() == [2, 2]

    def test_memory_that_moved_is_refused(self):
        layer = torch.nn.Linear(4, 4).requires_grad_(False)
        x = torch.ones(1, 4)
        graph = FakeGraphs().capture(lambda: layer(x))
        graph.replay()
        layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
        with pytest.raises(GraphError, match="1 tensors from memory it has never seen"):
            graph.replay()


class Failing(FakeGraphs):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.attempts = error, 0

    def capture(self, call):
        self.attempts += 1
        raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "CUDA out of memory"),
        (GraphError("it cannot be recorded: .item()"), "cannot be recorded"),
    ],
)
def test_what_cannot_be_recorded_is_said_once_and_called(error, words, caplog):
    pool = GraphPool(backend := Failing(error))
    call = partial(work, torch.eye(4))
    for rows in (3, 3, 5):
        args = inputs("cpu", rows=rows)
        assert_equal(pool.run("work", call, *args), call(*args))
    assert backend.attempts == 2  # once per shape
    (record,) = caplog.records
    assert words in record.message and "work of [3, 4]" in record.message


class Small(FakeGraphs):
    """A device with room for one graph beside the call itself."""

    def capture(self, call):
        if self.alive:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return super().capture(call)

    def release(self):
        gc.collect()  # a fake graph keeps its call, which keeps its buffers, and they the graph


def test_a_new_graph_comes_before_the_old_ones(caplog):
    pool, call = GraphPool(backend := Small()), partial(work, torch.eye(4))
    for rows in (3, 5, 5, 3):
        args = inputs("cpu", rows=rows)
        assert_equal(pool.run("work", call, *args), call(*args))
        assert pool.num_graphs == 1
    assert backend.num_captures == 3 and not caplog.records


def test_a_strict_pool_keeps_what_was_warmed_up():
    pool, call = GraphPool(Small(), capacity=2, strict=True), partial(work, torch.eye(4))
    with pool.warming():
        for rows in (3, 5):
            pool.run("work", call, *inputs("cpu", rows=rows))
    assert pool.num_graphs == 1 and len(pool.graphs) == 2
    pool = GraphPool(FakeGraphs(), capacity=2, strict=True)
    with pool.warming():
        for rows in (3, 5, 7):
            pool.run("work", call, *inputs("cpu", rows=rows))
    for rows in (3, 5, 7):
        pool.run("work", call, *inputs("cpu", rows=rows))
    assert pool.num_graphs == 3


def test_strict_pools_say_what_cannot_be_recorded():
    pool = GraphPool(Failing(GraphError("it cannot be recorded: .item()")), strict=True)
    with pytest.raises(GraphError, match="cannot be recorded"), pool.warming():
        pool.run("work", partial(work, torch.eye(4)), *inputs("cpu"))


def test_other_errors_are_the_callers():
    def fails(x):
        raise ValueError("no")

    pool = GraphPool(FakeGraphs())
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            pool.run("fails", fails, torch.ones(1))
    assert not pool.graphs


def test_pools_on_request():
    cpu = torch.device("cpu")
    assert graph_pool(cpu, "auto", False) is graph_pool(cpu, "off", False) is None
    fake = FakeGraphs()
    assert graph_pool(cpu, fake, True).backend is fake
    with pytest.raises(ConfigError, match="graphs is 'of'; allowed"):
        graph_pool(cpu, "of", False)
    with pytest.raises(ConfigError, match="strict_graphs needs graphs: they are 'auto' on cpu"):
        graph_pool(cpu, "auto", True)


def test_errors_of_the_device_name_the_task():
    with pytest.raises(DeviceError, match="out of memory for four pictures: CUDA out"):
        with device_errors("four pictures"):
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
    with pytest.raises(DeviceError, match="failed during four pictures .CUDA error: unspecified"):
        with device_errors("four pictures"):
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")
    with pytest.raises(KeyError), device_errors("four pictures"):
        raise KeyError("theirs")
