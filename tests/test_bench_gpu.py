"""The GPU benchmark runs on small models, over equal weights, and loses nothing to a failure."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch

from bench import full_size, gpu
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
        assert row["floor_ms"]["bf16"] > 0 and set(row["% of floor"]) >= {"diffusers", "ours graph"}


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


def test_cells_that_fail_lose_nothing():
    def fails():
        raise RuntimeError("no\nmore")

    clock = gpu.Clock(30.0)
    times = clock.times({"works": lambda: time.sleep(0.001), "fails": fails})
    assert times["fails"] == {"error": "RuntimeError: no"} and times["works"].p50 >= 1.0
    slow = gpu.Clock(0.1).times({"slow": lambda: time.sleep(0.05)})
    assert "skipped" in slow["slow"]
    assert gpu.Clock(-1.0).cell(fails) == {"skipped": "the budget is spent"}


def test_full_size_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--device", "cpu"])
    assert caught.value.code == 2 and "--tiny runs anywhere" in capsys.readouterr().err
