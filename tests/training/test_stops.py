"""How runs end before their time: signals, rewards that fail, and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tdm_r1.errors import RewardError
from tdm_r1.training import checkpoint
from tdm_r1.training.tdm import Tdm
from tdm_r1.training.trainer import Interrupted, Trainer
from tests.training.common import hashes, recipe, write_recipe
from tests.training.launch import (
    TRAIN,
    clean_environment,
)

BAD_REWARDS = {
    "nan": ("return [float('nan')] * len(images)", "not finite|nan"),
    "short": ("return [1.0]", "must return [34] numbers"),
    "raises": ("raise RuntimeError('the scorer fell over')", "the scorer fell over"),
}


@pytest.mark.parametrize("evaluated", ["", "shapes:strict"])
@pytest.mark.parametrize("case", sorted(BAD_REWARDS))
def test_a_failing_reward_takes_no_step_and_leaves_a_checkpoint(case, evaluated, tmp_path, sd3_dir):
    body, message = BAD_REWARDS[case]
    file = tmp_path / "bad.py"
    file.write_text(f"def score(images, prompts):\n    {body}\n")
    evaluation = {"families": ["counting"], "num_prompts": 4, "reward": evaluated}
    trainer = Trainer(recipe(tmp_path, sd3_dir, reward=f"{file}:score", evaluation=evaluation))
    before = hashes(trainer)
    with pytest.raises(RewardError, match=message) as error:
        trainer.run()
    if case == "nan":
        trained = [prompt for pool in trainer.method.sampler.pools for prompt in pool]
        scored = trained if evaluated else trainer.evaluator.prompts
        assert any(prompt in str(error.value) for prompt in scored)
    assert hashes(trainer) == before
    assert trainer.method.sampler.position == 0
    found = checkpoint.latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert checkpoint.load_checkpoint(found)[1]["iteration"] == 0


def test_sigterm_finishes_the_iteration_and_leaves_a_checkpoint(tmp_path, sd3_dir, bright):
    path = write_recipe(tmp_path, sd3_dir, reward=bright, iterations=10_000)
    command = [sys.executable, str(TRAIN), "--recipe", str(path)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=clean_environment()
    ) as run:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.time() + 200
        while (
            time.time() < deadline
            and run.poll() is None
            and not (metrics.exists() and "surrogate_loss" in metrics.read_text())
        ):
            time.sleep(0.2)
        run.send_signal(signal.SIGTERM)
        _, stderr = run.communicate(timeout=100)
    assert run.returncode == 128 + signal.SIGTERM, stderr[-2000:]
    assert "--resume goes on" in stderr
    found = checkpoint.latest_checkpoint(tmp_path / "run")
    assert found is not None
    _, state = checkpoint.load_checkpoint(found)
    done = [
        json.loads(line)["iteration"]
        for line in metrics.read_text().splitlines()
        if "surrogate_loss" in line
    ]
    assert state["iteration"] == done[-1] >= 1


@pytest.mark.parametrize("where", ["_trajectories", "_backward"])
def test_a_stop_is_heard_between_micro_batches(where, tmp_path, sd3_dir, bright, monkeypatch):
    calls, inner = [], getattr(Tdm, where)

    def stopped(self, *given):
        calls.append(where)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, *given)

    monkeypatch.setattr(Tdm, where, stopped)
    values = {"reward": bright, "rollout": {"num_prompts": 4, "group_size": 2, "micro_groups": 1}}
    values["distillation"] = {"boundaries": 1}
    trainer = Trainer(recipe(tmp_path, sd3_dir, **values))
    before = hashes(trainer)
    with pytest.raises(Interrupted, match="SIGTERM after iteration 0"):
        trainer.run()
    assert len(calls) == 2 and hashes(trainer) == before
    monkeypatch.undo()
    resumed, whole = (
        Trainer(recipe(tmp_path / name, sd3_dir, **values), resume=name == ".")
        for name in (".", "whole")
    )
    for each in (resumed, whole):
        each.run()
    assert hashes(resumed) == hashes(whole)


def test_whatever_fails_in_scoring_leaves_a_checkpoint(tmp_path, sd3_dir):
    file = tmp_path / "third.py"
    file.write_text(
        "from tdm_r1.errors import ConfigError\n"
        "calls = []\n"
        "def score(images, prompts):\n"
        "    if len(images) == 3:  # a group: evaluation has four\n"
        "        calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        raise ConfigError('a prompt without quotes')\n"
        "    return list(range(len(images)))\n"
    )
    trainer = Trainer(recipe(tmp_path, sd3_dir, reward=f"{file}:score"))
    with pytest.raises(RewardError, match="a prompt without quotes"):
        trainer.run()
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "checkpoint-000001"


def test_a_stop_before_any_role_changed_drops_the_step(tmp_path, sd3_dir):
    file = tmp_path / "stop.py"
    file.write_text(
        "import os, signal\n"
        "def score(images, prompts):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return list(range(len(images)))\n"
    )
    evaluation = {"families": ["counting"], "num_prompts": 4, "reward": "shapes:strict"}
    trainer = Trainer(recipe(tmp_path, sd3_dir, reward=f"{file}:score", evaluation=evaluation))
    before = hashes(trainer)
    with pytest.raises(Interrupted, match="SIGTERM after iteration 0"):
        trainer.run()
    assert hashes(trainer) == before
    state = checkpoint.load_checkpoint(checkpoint.latest_checkpoint(tmp_path / "run"))[1]
    assert (state["iteration"], state["method"]["position"]) == (0, 0)
