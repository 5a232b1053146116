"""The GPU benchmark runs on small models, over equal weights, and loses nothing to a failure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tdm_kernels import reference_fp8, registry, select
from tdm_kernels.quantized import Quantized

from bench import full_size, gpu, ops
from tdm_r1 import flow
from tdm_r1.trajectory import finish


@pytest.mark.slow
def test_gpu_runs_on_small_models(capsys, tmp_path):
    output = tmp_path / "gpu.json"
    arguments = ["--tiny", "--device", "cpu", "--compile-mode", "none", "--output", str(output)]
    assert gpu.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(output.read_text()) and result["tiny"]
    assert [row["model"] for row in result["rows"]] == ["zimage", "sd35m"]
    for row in result["rows"]:
        assert set(row["transformer_ms"]) == set(row["whole_ms"]) == {
            "diffusers", "ours eager", "ours graph", "ours fp8 graph",
        }  # fmt: skip
        for stage in ("text_ms", "transformer_ms", "vae_ms", "whole_ms"):
            assert all(times["p50"] > 0 for times in row[stage].values()), row[stage]
        assert row["unrecorded"] == {"ours graph": 0, "ours fp8 graph": 0}
        assert row["floor_ms"]["bf16"] > 0 and set(row["% of floor"]) >= {"diffusers", "ours graph"}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a compiler")
def test_gpu_times_the_compiled_peer_after_the_others(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "COMPILE_SECONDS", 1.0)
    options = ["--tiny", "--device", "cpu", "--models", "sd35m", "--compile-mode", "default"]
    assert gpu.main(options) == 0
    first, second = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert "text_ms" in first and "text_ms" not in second
    for stage in ("transformer_ms", "whole_ms"):
        assert set(second[stage]) - set(first[stage]) == {"diffusers compiled"}
        assert all(times["p50"] > 0 for times in second[stage].values())


@pytest.mark.parametrize("family", full_size.FAMILIES)
def test_full_size_subjects_compute_the_same(family):
    torch.manual_seed(0)
    subject = full_size.make(family, torch.device("cpu"), torch.float32, tiny=True)
    with torch.no_grad():
        cond, text = subject.pipeline.text.encode(["a"]), subject.encode_peer(512)
        torch.testing.assert_close(cond.tokens_BTE, text[0], atol=1e-4, rtol=1e-4)
        engine = subject.engine("off")
        noise = engine.noise([0, 1], 64, 64)
        mine = engine.rollout(cond, noise).x[-1]
        theirs = subject.sample_peer(subject.transformer, text, noise)
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
        pixels = subject.decode_peer(mine).int(), finish(subject.pipeline.vae, mine, "pil")[0].int()
    assert (pixels[0] - pixels[1]).abs().max() <= 1


@pytest.mark.parametrize(
    ("family", "size", "teraflops"),
    # One forward of diffusers' modules, every op intercepted: embeddings and modulation too, which
    # the floor leaves out.
    [("zimage", 1024, 47.84 + 8.74), ("zimage", 512, 13.05 + 0.64), ("sd35m", 1024, 7.02 + 4.23)],
)
def test_floors_count_the_arithmetic(family, size, teraflops):
    config = {"zimage": full_size.ZIMAGE, "sd35m": full_size.SD35M}[family]
    text = full_size.RandomText(torch.device("cpu"), lambda size: (), family)
    pipeline = SimpleNamespace(vae=SimpleNamespace(scale_factor=8), text=text)
    subject = full_size.Subject(
        family, config, None, None, None, pipeline, flow.schedule("euler", 4, 3.0)
    )
    found = sum(subject.flops(size, 1).values()) / 4e12
    assert 0.99 < found / teraflops <= 1


def test_cells_that_fail_lose_nothing(monkeypatch):
    def fails():
        raise RuntimeError("no\nmore")

    clock = gpu.Clock(30.0)
    times = clock.times({"works": lambda: time.sleep(0.001), "fails": fails})
    assert times["fails"] == {"error": "RuntimeError: no"} and times["works"].p50 >= 1.0
    slow = gpu.Clock(0.1).times({"slow": lambda: time.sleep(0.05)})
    assert "skipped" in slow["slow"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)  # as on a device that is lost
    assert clock.cell(fails) == {"error": "RuntimeError: no"}
    assert gpu.Clock(-1.0).cell(fails) == {"skipped": "the budget is spent"}


def test_rows_that_cannot_end_in_time_are_not_begun(monkeypatch):
    class Row:
        def __init__(self, *_):
            pass

        def sample(self):
            return {"diffusers": None, "ours fp8 graph": None}

        def measure(self, *_):
            row["measured"] = True

    monkeypatch.setattr(gpu, "Row", Row)
    subject = SimpleNamespace(flops=lambda size, batch: {"products": 4e12, "attention": 1e12})
    roof = {"flops_per_s_bf16": 1e12, "flops_per_s_fp8": 2e12}  # 5 s and 3 s, seven times
    row = {"model": "sd35m", "size": 512, "batch": 1}
    found = gpu._row(subject, None, None, gpu.Clock(50.0), roof, row, lambda: None)
    assert found == {"skipped": "it takes 56 s at the roofs, and 50 s are left"}
    assert gpu._row(subject, None, None, gpu.Clock(60.0), roof, row, lambda: None) is None
    assert row["measured"] and row["floor_ms"] == {"bf16": 5000.0, "fp8": 3000.0}


def executable(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("end", "last"),
    [
        ("exit 3", {"error": "its process ended with status 3"}),
        ("exec sleep 60", {"skipped": "its process was ended after its 1 s"}),
    ],
)
def test_a_process_that_dies_leaves_what_it_stored(end, last, monkeypatch, tmp_path, capsys):
    row = {"model": "any", "size": 512, "batch": 1}
    lines = "for file; do :; done", f"echo '{json.dumps({'bench': 'gpu', 'rows': [row]})}' > $file"
    monkeypatch.setattr(gpu.sys, "executable", executable(tmp_path / "python", *lines, end))
    output = tmp_path / "gpu.json"
    options = ["--tiny", "--device", "cpu", "--budget", "2", "--output", str(output)]
    assert gpu.main(options) == 0
    found = json.loads(output.read_text())
    assert found == json.loads(capsys.readouterr().out) and found["bench"] == "gpu"
    first, second = {"model": "zimage"} | last, {"model": "sd35m"} | last
    assert found["rows"] == [row, first, row, second] and found["seconds"] < 10


def test_an_interrupt_ends_the_run_and_keeps_the_rows(monkeypatch, tmp_path, capsys):
    row = {"model": "zimage", "size": 512, "batch": 1}

    def run(command, **_):
        Path(command[-1]).write_text(json.dumps({"rows": [row]}))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.main(["--tiny", "--device", "cpu", "--output", str(tmp_path / "gpu.json")]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert rows == [row, {"model": "zimage", "skipped": "interrupted"}]


PARTS = ("bench.gpu", "bench.ops", "bench.consistency")


@pytest.mark.parametrize("limit", [570, 3])
def test_on_gpu_runs_every_part_within_its_limit(limit, tmp_path):
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "cmake", "echo no compiler; exit 1")
    python = executable(
        tmp_path / "bin" / "python", 'echo "$@ in $PYTHONPATH" >> "$CALLS"',
        '[ "$2" = pytest ] && exec sleep "$NAP"', '[ "$2" = bench.ops ] && exit 1', "exit 0",
    )  # fmt: skip
    calls, out = tmp_path / "calls", tmp_path / "out"
    settings = {"PYTHON": python, "LIMIT": str(limit), "CALLS": str(calls), "PYTHONPATH": "/site"}
    settings |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    settings |= {"NAP": "0" if limit > 60 else "60"}
    script = Path(gpu.__file__).with_name("on_gpu.sh")
    began = time.monotonic()
    done = subprocess.run(["sh", script, out, "--quick"], env=os.environ | settings, check=False)
    assert done.returncode == 1 and time.monotonic() - began < 30
    assert "no compiler" in (out / "native.log").read_text()
    _, tests, *parts = calls.read_text().splitlines()
    assert "-m pytest -m gpu" in tests and "tests/test_graphs.py" in tests
    assert [line.split()[1] for line in parts] == list(PARTS)
    assert all(line.endswith(":/site") for line in parts) and "--quick in" in parts[0]
    budget = int(parts[0].split("--budget ")[1].split()[0])
    assert 360 < budget <= 370 if limit == 570 else budget == 1


def test_on_gpu_has_time_for_every_part_where_all_take_theirs(tmp_path):
    """On a clock that every part moves by the whole of its bound."""
    (tmp_path / "bin").mkdir()
    python = executable(tmp_path / "bin" / "python", "exit 0")
    executable(tmp_path / "bin" / "date", 'cat "$CLOCK"')
    executable(
        tmp_path / "bin" / "timeout", "shift 4", 'echo "$@" >> "$CALLS"',
        'echo $(($(cat "$CLOCK") + $1)) > "$CLOCK"',
    )  # fmt: skip
    calls, clock = tmp_path / "calls", tmp_path / "clock"
    clock.write_text("0")
    settings = {"PYTHON": python, "CALLS": str(calls), "CLOCK": str(clock)}
    settings |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    script = Path(gpu.__file__).with_name("on_gpu.sh")
    environment = {k: v for k, v in os.environ.items() if k != "LIMIT"} | settings
    assert (
        subprocess.run(["sh", script, tmp_path / "out"], env=environment, check=False).returncode
        == 0
    )
    lines = calls.read_text().splitlines()
    seconds = {part: int(line.split()[0]) for line in lines for part in PARTS if part in line}
    assert len(lines) == 6 and sum(int(line.split()[0]) for line in lines) == int(clock.read_text())
    assert int(clock.read_text()) <= 570
    assert seconds["bench.ops"] == 150 and seconds["bench.consistency"] == 30
    assert seconds["bench.gpu"] >= 120  # the budget of --quick is 110


def test_ops_of_a_gpu_are_held_to_the_reference_and_name_every_form(monkeypatch):
    small = ops._rms_cases("small", 1, 6, 64, 2, 32, "cpu", torch.float32)
    small += ops._layer_norm_cases("small", 4, 6, 64, 2, 32, "cpu", torch.float32)
    small += [ops._convolution("small", 32, 5, "cpu", torch.float32)]
    small += [ops._solver_step("small", 4, 6, "cpu", torch.float32)]
    small += [ops._linear("small", 5, 32, 48, "cpu", torch.float32)]
    trained = [case.in_training() for case in small if case.op in ops.ROWS]
    producers = [case.in_e4m3() for case in small if case.op in ops.FP8_OPS and not case.rows]
    for case in (*small, *trained, *producers):
        bound = select("auto", "cpu", grad=case.trained > 0, rows=case.rows)
        assert ops.check(case, bound) <= 1
        outputs = case.call(case.function(bound))
        assert (outputs[-1].shape == case.args[0].shape) >= (case.trained > 0), case.op
        assert isinstance(outputs[-1], Quantized) == case.shape.endswith("e4m3")

    def coarse(x):
        rows = reference_fp8.gelu_tanh_fp8(x)
        return Quantized(rows.values, rows.scale * 1.2)

    with pytest.raises(RuntimeError, match="gelu_tanh at small e4m3 errs"):
        ops.check(producers[-1], SimpleNamespace(gelu_tanh=coarse))

    def meta(device):
        return lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")

    monkeypatch.setattr(ops, "_random", meta)
    found = list(ops.cases("cuda", torch.bfloat16))
    assert len({(case.op, case.shape) for case in found}) == len(found) == 46
    kinds = {case.op for case in found}
    assert kinds == set(registry.TRITON_OPS)
    assert {case.op for case in found if case.rows} == set(registry.FP8_OPS)
    in_training = {case.op for case in found if case.trained}
    assert in_training == set(ops.ROWS)


def test_an_op_that_fails_loses_nothing(monkeypatch, capsys, tmp_path):
    cases = [ops.Case(op, "any", [torch.randn(1, 4, 8)]) for op in ("swiglu", "gelu_tanh")]
    monkeypatch.setattr(ops, "cases", lambda *_: cases)
    monkeypatch.setattr(ops, "roofs", lambda *_: {"flops_per_s": 1e12, "bytes_per_s": 1e12})
    output, threads = tmp_path / "ops.json", torch.get_num_threads()
    assert ops.main(["--threads", str(threads), "--repeats", "5", "--output", str(output)]) == 1
    failed, worked = json.loads(output.read_text())["rows"]
    assert failed["op"] == "swiglu" and "TypeError" in failed["error"]
    assert worked["op"] == "gelu_tanh" and worked["us"]["ours"]["p50"] > 0


def test_an_interrupt_ends_the_ops_and_keeps_the_rows(monkeypatch, capsys, tmp_path):
    def measure(case, *_):
        if case.op == "gelu_tanh":
            raise KeyboardInterrupt
        return {"op": case.op, "shape": case.shape, "speedup over": {"reference": 1.0}}

    cases = [ops.Case(op, "any", []) for op in ("swiglu", "gelu_tanh", "norm_modulate")]
    monkeypatch.setattr(ops, "cases", lambda *_: cases)
    monkeypatch.setattr(ops, "roofs", lambda *_: {})
    monkeypatch.setattr(ops, "measure", measure)
    output, threads = tmp_path / "ops.json", str(torch.get_num_threads())
    assert ops.main(["--threads", threads, "--device", "cpu", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["rows"] == [
        measure(cases[0]), {"op": "gelu_tanh", "shape": "any", "skipped": "interrupted"}
    ]  # fmt: skip


def test_full_size_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--device", "cpu"])
    assert caught.value.code == 2 and "--tiny runs anywhere" in capsys.readouterr().err
