"""The bench runs, checks before it times, and ends in one line of JSON."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gradient_signal, timing, train
from bench.generate import main
from bench.timing import interleaved

BENCH = Path(timing.__file__).parent


def test_every_bench_starts_by_its_path(tmp_path):
    files = sorted(path for path in BENCH.glob("*.py") if "__main__" in path.read_text())
    assert {"count.py", "export.py", "generate.py", "gpu.py", "ops.py"} <= {f.name for f in files}
    root = str(BENCH.parent)
    code = f"""
import runpy, sys
for file in {list(map(str, files))}:
    sys.path[:] = [folder for folder in sys.path if folder not in ("", {root!r})]
    for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
        del sys.modules[name]
    assert callable(runpy.run_path(file, run_name="script")["main"])
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("cuda", [False, True])
def test_quantiles_of_interleaved_calls(cuda, monkeypatch):
    for name, value in (("is_available", cuda), ("is_initialized", cuda), ("synchronize", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    calls = []
    times = interleaved(
        {
            "short": lambda: calls.append("s"),
            "long": lambda: (calls.append("l"), time.sleep(0.002)),
        },
        repeats=5,
        warmup=1,
    )
    turns = [(name, len(list(run))) for name, run in itertools.groupby(calls)]
    assert "".join(name for name, _ in turns) == "sl" * 6
    assert all(count == 1 for name, count in turns if name == "l")
    assert all(count > 1 for name, count in turns[2:] if name == "s")  # a block, once it is known
    assert times["long"].p20 >= 2.0 > times["short"].p50
    assert times["long"].p20 <= times["long"].p50 <= times["long"].p80
    with pytest.raises(ValueError, match="repeats is 4"):
        interleaved({}, repeats=4)


class Device:
    """A CUDA device on a clock of its own, in milliseconds: Python queues, the device follows."""

    L2 = 1000

    def __init__(self):
        self.now = self.done = 0.0  # when Python is, and when the device will have nothing left
        self.turns = []  # bytes written, and kernels queued since
        cuda = {"Event": lambda enable_timing: Event(self), "current_stream": lambda device: None}
        cuda["get_device_properties"] = lambda device: SimpleNamespace(L2_cache_size=self.L2)
        self.torch = SimpleNamespace(
            cuda=SimpleNamespace(**cuda), device=torch.device, uint8=torch.uint8, empty=self.empty
        )

    def queue(self, launch, run):
        self.now += launch
        self.done = max(self.done, self.now) + run

    def empty(self, size, **_):
        def write():
            self.turns.append((size, []))
            self.queue(0.005, 0.07)

        return SimpleNamespace(zero_=write)

    def op(self, name, waits=False):
        self.turns[-1][1].append(name)
        self.queue(0.03, 0.004)
        self.now = max(self.now, self.done) if waits else self.now


class Event:
    def __init__(self, device):
        self.device = device

    def record(self, _):
        self.at = max(self.device.now, self.device.done)

    def query(self):
        return self.device.now >= self.at

    def synchronize(self):
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_device_is_timed_by_its_own_clock(monkeypatch):
    device = Device()
    monkeypatch.setattr(timing, "torch", device.torch)
    calls = {"op": lambda: device.op("op"), "waits": lambda: device.op("waits", waits=True)}
    alone = interleaved({"op": calls["op"]}, repeats=5, device="cuda")
    assert alone["op"].p20 == alone["op"].p80 == 0.004  # not the 0.03 of queuing it
    turns = [run for _, run in device.turns if run]
    assert 50 <= len(turns[-1]) <= 51  # 0.2 ms
    assert all(size > device.L2 for size, _ in device.turns)
    both = interleaved(calls, repeats=5, device="cuda:1")
    assert both["op"].p50 == 0.004 and both["waits"].p50 > 0.02
    assert all(len(set(run)) <= 1 for _, run in device.turns)  # the cache is written in between


def test_the_wall_clock_of_a_cpu_asks_nothing_of_cuda(monkeypatch):
    monkeypatch.setattr(timing, "torch", SimpleNamespace(device=torch.device))
    assert interleaved({"any": lambda: time.sleep(0.001)}, repeats=5, device="cpu")["any"].p20 >= 1


@pytest.mark.parametrize("model", ["sd3_dpm_dir", "zimage_dir"])
def test_generate(model, request, capsys, tmp_path):
    directory, threads = request.getfixturevalue(model), torch.get_num_threads()
    output = tmp_path / "results" / "generate.json"
    try:
        arguments = ["--batches", "2", "--repeats", "5", "--threads", "1", "--output", str(output)]
        assert main(["--model", str(directory), *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(output.read_text())
    (row,) = result["rows"]
    assert row["batch"] == 2 and row["latent_error"] <= 1e-4
    assert set(row["call_ms"]) == {"diffusers", "new prompt", "known prompt", "reference ops"}


def test_train(capsys):
    threads = torch.get_num_threads()
    sizes = ["--prompts", "2", "--group", "2", "--micro-groups", "1"]
    try:
        assert train.main([*sizes, "--rounds", "1", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["forwards_per_boundary"] == {"ours": 8.2, "baseline": 13}
    assert result["images"] == 4 and result["latent_error"] <= train.TOLERANCE
    for side in ("ours", "baseline"):
        split = [result[side][phase] for phase in train.PHASES]
        assert min(split) > 0 and sum(split) <= 1.01 * result[side]["seconds"]


def test_gradient_signal(capsys):
    threads = torch.get_num_threads()
    try:
        sizes = [
            "--prompts",
            "3",
            "--set",
            "rollout.micro_groups=1",
            "--set",
            "rollout.group_size=2",
        ]
        assert gradient_signal.main([*sizes, "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["pictures"] == 2  # of each set; the third prompt is in neither
    assert [row["lower"] for row in result["rows"]] == list(gradient_signal.EDGES[:-1])
    assert all(row["norm"] > 0 and abs(row["cosine"]) < 1 for row in result["rows"])


def test_signal_of_known_gradients():
    """Two samples of mean 1 and deviation 3, n = 9: as much noise as signal."""
    draws = torch.Generator().manual_seed(0)
    first, second = (1 + torch.randn(100_000, generator=draws).double() for _ in range(2))
    found = gradient_signal.compare(first, second, 9)
    assert found["cosine"] == pytest.approx(0.5, abs=0.01)
    assert found["pictures_for_half"] == pytest.approx(9, abs=1)
    assert gradient_signal.compare(first, -first, 9)["pictures_for_half"] is None
