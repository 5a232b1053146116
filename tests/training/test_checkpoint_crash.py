"""Checkpoints under SIGKILL at random moments, and on a disk that has no room left."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tdm_r1.errors import SaveError
from tdm_r1.training.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).parents[2]
NUM_KILLS = 20


def groups(step):
    """Two files whose every number is the step."""
    return {name: {"x": torch.full((30_000,), float(step))} for name in ("generator", "fake")}


def save_forever(run_dir, step):
    """New steps, each one then replaced; two are kept and every third is the best."""
    while True:
        step += 1
        path, best = checkpoint_path(run_dir, step), checkpoint_path(run_dir, step - step % 3)
        for _ in range(2):
            save_checkpoint(path, groups(step), {"step": step}, keep_last=2, keep=best)


def kill_savers(run_dir):
    """Fork a saver, kill it, look, NUM_KILLS times; prints what was found as JSON.

    A process of its own: it has imported torch once and has no threads, so that forking is safe.
    """
    torch.set_num_threads(1)
    rng, found, step = random.Random(0), [], 0
    for _ in range(NUM_KILLS):
        child = os.fork()
        if child == 0:
            save_forever(run_dir, step)
        time.sleep(rng.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        interrupted = any(name.startswith(".tmp-") for name in os.listdir(run_dir))
        latest = latest_checkpoint(run_dir)
        before, step = step, -1
        if latest is not None:
            tensors, state = load_checkpoint(latest)  # verifies every byte
            step = state["step"]
            same = all(torch.equal(t["x"], groups(step)[g]["x"]) for g, t in tensors.items())
            assert same and len(tensors) == 2, step
        found.append({"before": before, "step": step, "interrupted": interrupted})
    print(json.dumps(found))


def test_sigkill_at_random_moments_leaves_a_loadable_checkpoint(tmp_path):
    save_checkpoint(checkpoint_path(tmp_path, 0), groups(0), {"step": 0})
    code = "import sys; from tests.training.test_checkpoint_crash import kill_savers as k; "
    run = subprocess.run(
        [sys.executable, "-c", code + "k(sys.argv[1])", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert len(found) == NUM_KILLS
    for kill in found:
        assert kill["step"] >= kill["before"] >= 0, kill  # nothing published is ever lost
    assert found[-1]["step"] > 0  # they did save
    assert any(kill["interrupted"] for kill in found)  # and some died halfway


@pytest.fixture
def little_room():
    """Files of at most 50 kB, as on a disk that fills up; Python ignores the signal for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, little_room):
    small = {"generator": {"x": torch.arange(6.0)}}
    save_checkpoint(checkpoint_path(tmp_path, 1), small, {"step": 1})
    message = r"checkpoint .*checkpoint-000002 could not be written: .*File too large.*000001 is"
    with pytest.raises(SaveError, match=message):
        save_checkpoint(checkpoint_path(tmp_path, 2), groups(2), {"step": 2}, keep_last=1)
    assert os.listdir(tmp_path) == ["checkpoint-000001"]
    assert torch.equal(load_checkpoint(tmp_path / "checkpoint-000001")[0]["generator"]["x"],
                       small["generator"]["x"])  # fmt: skip
    with pytest.raises(SaveError, match="there is no earlier one"):
        save_checkpoint(checkpoint_path(tmp_path / "new", 1), groups(1), {"step": 1})


def test_a_state_that_does_not_fit_is_reported_too(tmp_path, little_room):
    with pytest.raises(SaveError, match="File too large"):
        save_checkpoint(checkpoint_path(tmp_path, 1), {}, {"x": "x" * 60_000})
    assert os.listdir(tmp_path) == []
