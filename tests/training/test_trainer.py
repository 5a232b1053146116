"""Whole runs of the trainer on random tiny models, in this process and under the launcher."""

import json
import shutil

import numpy as np
import pytest
import torch

from tdm_r1 import Engine
from tdm_r1.errors import ConfigError, LoadError, RewardError
from tdm_r1.training import checkpoint, data, distributed
from tdm_r1.training.curves import read_metrics
from tdm_r1.training.trainer import Trainer, learning_rate
from tests.training.common import hashes, recipe, write_recipe
from tests.training.launch import (
    assert_same_roles,
    start_ranks,
)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_tdm_r1_trains_every_role_and_leaves_a_usable_model(kind, tmp_path, sd3_dir, bright):
    trainer = Trainer(
        recipe(tmp_path, sd3_dir, reward=bright, roles={"kind": kind, "rank": 4, "alpha": 4.0})
    )
    before = hashes(trainer)
    results = trainer.run()
    after = hashes(trainer)
    for name in ("generator", "fake", "surrogate", "ema", "lag"):
        assert before[name] != after[name], name
    assert before["base"] == after["base"]
    assert "reference" not in trainer.roles  # frozen by default: the base itself
    assert results["after"]["num_prompts"] == 4
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if "evaluation" not in line]
    assert [line["iteration"] for line in steps] == [1, 2]
    assert all(np.isfinite(value) for line in steps for value in line.values())
    if kind == "lora":
        engine = Engine.from_pretrained(sd3_dir, lora=tmp_path / "run")
    else:
        engine = Engine.from_pretrained(tmp_path / "run" / "model")
    assert engine.generate("two red circles", seed=1)[0].size == (64, 64)


def test_resolution_and_text_length_are_the_recipes(tmp_path, sd3_dir, bright):
    values = {"resolution": 32, "t5_length": 7, "iterations": 1, "reward": bright}
    trainer = Trainer(recipe(tmp_path, sd3_dir, **values))
    assert trainer.pipeline.text.t5_length == 7
    trainer.run()
    pictures = trainer.evaluator.pictures(trainer.roles["ema"], ["two red circles"], 0)
    assert pictures[0].size == (32, 32)
    with pytest.raises(ConfigError, match="resolution is 40; allowed: a multiple of 16"):
        Trainer(recipe(tmp_path / "odd", sd3_dir, resolution=40, reward=bright))


@pytest.mark.parametrize("method", ["sft", "tdm"])
def test_the_other_methods_run_on_zimage(method, tmp_path, zimage_dir):
    trainer = Trainer(recipe(tmp_path, zimage_dir, method=method))
    before = hashes(trainer)
    trainer.run()
    after = hashes(trainer)
    assert before["generator"] != after["generator"]
    assert before["base"] == after["base"]


def test_sft_learns(tmp_path, sd3_dir):
    values = {
        "method": "sft",
        "iterations": 40,
        "roles": {"kind": "full"},
        "optimizers": {"generator": {"lr": 2e-3, "betas": [0.9, 0.99]}},
    }
    Trainer(recipe(tmp_path, sd3_dir, **values)).run()
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["sft_loss"] for line in lines if "sft_loss" in line]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_sft_reads_an_image_folder(tmp_path, sd3_dir, monkeypatch):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"red {i}"}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    trainer = Trainer(
        recipe(tmp_path, sd3_dir, method="sft", data={"source": str(folder), "batch_size": 4})
    )
    assert trainer.method.data.latents_NChw.shape == (4, 16, 8, 8)
    assert len(trainer.method.data.condition) == 5
    sizes, inner = [], trainer.pipeline.vae.encode

    def encode(images):
        sizes.append(len(images))
        return inner(images)

    monkeypatch.setattr(data, "DECODE_LIMIT", 3 * 64 * 64)
    monkeypatch.setattr(trainer.pipeline.vae, "encode", encode)
    few = data.load_data(trainer.recipe.data, trainer.pipeline, 0)
    assert sizes == [3, 1]
    assert torch.allclose(few.latents_NChw, trainer.method.data.latents_NChw, atol=2e-3)
    trainer.run()
    (folder / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "x"}')

    with pytest.raises(ConfigError, match="metadata.jsonl:1: cannot read 9.png"):
        Trainer(recipe(tmp_path, sd3_dir, method="sft", data={"source": str(folder)}))


@pytest.mark.parametrize(
    ("kind", "zero_stage"), [("lora", 0), ("full", 0), ("full", 1), ("lora", 2)]
)
def test_resumed_equals_uninterrupted_bitwise(kind, zero_stage, tmp_path, sd3_dir, bright):
    def values(iterations):
        roles = {"kind": kind, "rank": 4, "alpha": 4.0}
        reinforcement = {"reference": "ema"}
        return {
            "reward": bright,
            "iterations": iterations,
            "roles": roles,
            "checkpoint_every": 1,
            "reinforcement": reinforcement,
            "zero_stage": zero_stage,
            "rollout": {"num_prompts": 2, "group_size": 2, "micro_groups": 1, "steps": 2},
            "evaluation": {"families": ["counting"], "num_prompts": 2},
        }

    whole = Trainer(recipe(tmp_path / "a", sd3_dir, **values(3)))
    whole.run()
    Trainer(recipe(tmp_path / "b", sd3_dir, **values(2))).run()
    resumed = Trainer(recipe(tmp_path / "b", sd3_dir, **values(3)), resume=True)
    assert resumed.iteration == 2
    resumed.run()
    assert hashes(resumed) == hashes(whole)


@pytest.mark.parametrize("method", ["tdm", "tdm_r1"])
def test_the_generator_waits_while_its_critics_warm_up(method, tmp_path, sd3_dir, bright):
    values = {
        "method": method,
        "reward": bright,
        "roles": {"kind": "full"},
        "distillation": {"boundaries": 1, "critic_warmup": 2},
        "optimizers": {"generator": {"lr": 1e-3, "decay": "cosine"}},
        "checkpoint_every": 1,
        "keep_checkpoints": 3,
    }
    trainer = Trainer(recipe(tmp_path / "a", sd3_dir, iterations=3, **values))
    waiting, critics = {"generator", "ema"}, set(trainer.engines) - {"generator"}
    before = hashes(trainer)
    trainer.method.step(0)
    after = hashes(trainer)
    changed = {name for name in before if before[name] != after[name]}
    assert critics <= changed and not changed & waiting

    whole = Trainer(recipe(tmp_path / "b", sd3_dir, iterations=3, **values))
    whole.run()
    lines = [json.loads(s) for s in (tmp_path / "b/run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "evaluation" not in line]
    assert ["generator_loss" in line for line in steps] == [False, False, True]
    assert ["grad_norm_generator" in line for line in steps] == [False, False, True]
    assert all("grad_norm_fake" in line for line in steps)

    def saved(iteration):
        folder = tmp_path / f"b/run/checkpoint-{iteration:06d}"
        return checkpoint.load_checkpoint(folder)[0]["generator"]

    start, waited, moved = trainer.roles["generator"].tensors(), saved(2), saved(3)
    assert all(torch.equal(tensor, waited[name]) for name, tensor in start.items())
    # Its rate starts where the wait ends: Adam's first step is the whole rate.
    steps_taken = [(moved[name] - waited[name]).abs().max() for name in moved]
    assert float(torch.stack(steps_taken).max()) == pytest.approx(1e-3, rel=0.02)

    shutil.rmtree(tmp_path / "b/run/checkpoint-000003")
    resumed = Trainer(recipe(tmp_path / "b", sd3_dir, iterations=3, **values), resume=True)
    resumed.run()
    assert hashes(resumed) == hashes(whole)


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_transfer_adds_what_the_surrogate_has_learnt(warmup, tmp_path, sd3_dir, bright):
    def run(folder, share):
        values = {
            "roles": {"kind": "full"},
            "reward": bright,
            "iterations": 3,
            "distillation": {"critic_warmup": warmup},
            "reinforcement": {"transfer": share},
        }
        trainer = Trainer(recipe(tmp_path / folder, sd3_dir, **values))
        trainer.method.step(0)
        return {name: role.tensors() for name, role in trainer.roles.items()}

    found, without = run("a", 0.5), run("b", 0.0)
    largest = 0.0
    for name, tensor in found["generator"].items():
        change = (found["surrogate"][name] - found["base"][name]).detach()
        added = (tensor - without["generator"][name]).detach()
        torch.testing.assert_close(added, 0.5 * change, rtol=1e-3, atol=1e-7)
        largest = max(largest, change.abs().max().item())
    assert largest > 1e-5
    still = all(torch.equal(t, without["base"][name]) for name, t in without["generator"].items())
    assert still == (warmup > 0)


@pytest.fixture
def two_and_one(tmp_path, sd3_dir, bright):
    """The recipe of a run in shares: done by two ranks, into `two`, and by one, into `one`."""
    values = {
        "reward": bright,
        "zero_stage": 2,
        "roles": {"kind": "full"},
        "rollout": {"num_prompts": 2, "group_size": 3, "micro_groups": 1},
        "iterations": 2,
        "checkpoint_every": 1,
    }
    path = write_recipe(tmp_path, sd3_dir, **values)
    two = start_ranks(["--recipe", str(path), "--set", f"output={tmp_path / 'two'}"])
    assert two.returncode == 0, two.stderr[-3000:]
    assert_same_roles(two, ("generator", "fake", "surrogate"))
    Trainer(recipe(tmp_path, sd3_dir, **values, output=str(tmp_path / "one"))).run()
    return values


def test_two_ranks_train_as_one_and_their_shares_resume_on_one(two_and_one, tmp_path, sd3_dir):
    pair = [
        checkpoint.load_checkpoint(checkpoint.latest_checkpoint(tmp_path / run))
        for run in ("two", "one")
    ]
    for group in ("optimizer-generator", "optimizer-fake"):
        shared, alone = (tensors[group] for tensors, _ in pair)
        assert pair[0][1][group] == pair[1][1][group] and set(shared) == set(alone)
        size = max(t.abs().max() for n, t in alone.items() if n.endswith("exp_avg"))
        for name, tensor in alone.items():
            if name.endswith("exp_avg"):  # two ranks sum gradients in another order
                assert (shared[name] - tensor).abs().max() <= 1e-2 * size, name
    rewards = [
        [
            json.loads(line)["reward"]
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
            if '"reward_std"' in line
        ]
        for run in ("one", "two")
    ]
    assert np.allclose(rewards[0], rewards[1], atol=1e-5)
    states = [
        Engine.from_pretrained(tmp_path / run / "model").pipeline.transformer.state_dict()
        for run in ("one", "two")
    ]
    # AdamW divides by sqrt(v): where a gradient is rounding noise its sign decides a whole lr.
    close = [
        torch.isclose(a, states[1][name], atol=1e-4).float().mean() for name, a in states[0].items()
    ]
    assert min(close) > 0.95
    settings = {"output": str(tmp_path / "two"), "iterations": 3, "zero_stage": 1}
    resumed = Trainer(recipe(tmp_path, sd3_dir, **two_and_one | settings), resume=True)
    found, _ = distributed.optimizer_state(resumed.engines["generator"])
    assert all(torch.equal(found[n], t) for n, t in pair[0][0]["optimizer-generator"].items())
    before = hashes(resumed)
    resumed.run()
    assert resumed.iteration == 3 and hashes(resumed) != before


def test_command_line_errors_are_one_line(tmp_path, sd3_dir, capsys):
    from tdm_r1.train import main

    path = write_recipe(tmp_path, sd3_dir)
    for arguments, status, message in (
        (["--recipe", "tiny-sd3-shape"], 2, "Did you mean 'tiny-sd3-shapes'"),
        (["--recipe", str(path), "--set", "itertions=2"], 2, "Did you mean 'iterations'"),
        (["--recipe", str(path), "--set", "reward=nothing"], 2, "nothing"),
        (["--recipe", str(path), "--set", "prompts.families=[a,b"], 2, "prompts.families"),
        (["--recipe", str(path), "--set", "model=no/such/dir/here"], 2, "no/such/dir/here"),
        (
            [
                "--recipe",
                str(path),
                "--set",
                "rollout.num_prompts=3",
                "--set",
                "rollout.micro_groups=2",
            ],
            2,
            "multiple",
        ),
    ):
        assert main(arguments) == status
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and message in lines[0], lines


def test_learning_rate_warms_up_and_decays():
    from tdm_r1.config import Optimizer

    plain, config = Optimizer(lr=2.0), Optimizer(lr=2.0, warmup=4, decay="cosine")
    assert learning_rate(plain, 7, 10) == 2.0
    assert [learning_rate(config, n, 100) for n in (0, 1)] == pytest.approx([0.5, 1.0], rel=1e-2)
    assert learning_rate(config, 50, 100) == pytest.approx(1.0)
    assert learning_rate(config, 99, 100) < 0.01


def test_a_used_output_is_not_overwritten(tmp_path, sd3_dir, bright):
    Trainer(recipe(tmp_path, sd3_dir, reward=bright, iterations=1, checkpoint_every=1)).run()
    with pytest.raises(ConfigError, match="pass --resume"):
        Trainer(recipe(tmp_path, sd3_dir, reward=bright))
    with pytest.raises(LoadError, match="written with seed 0, this is 1"):
        Trainer(recipe(tmp_path, sd3_dir, reward=bright, seed=1), resume=True)
    with pytest.raises(LoadError, match="nothing to resume"):
        Trainer(recipe(tmp_path / "new", sd3_dir, reward=bright), resume=True)
    with pytest.raises(ConfigError, match="output is '.*bright.py', a file; allowed: a folder"):
        Trainer(recipe(tmp_path, sd3_dir, reward=bright, output=bright.split(":")[0]))


def test_an_attempt_that_failed_before_its_first_iteration_is_no_earlier_run(
    tmp_path, sd3_dir, bright
):
    bad = tmp_path / "bad.py"
    bad.write_text("import sys\ndef score(images, prompts):\n    sys.exit()\n")
    with pytest.raises(RewardError, match="raised SystemExit"):
        Trainer(recipe(tmp_path, sd3_dir, reward=f"{bad}:score")).run()
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "checkpoint-000000"
    trainer = Trainer(recipe(tmp_path, sd3_dir, reward=bright, iterations=1, checkpoint_every=1))
    trainer.run()
    records, evaluations = read_metrics(tmp_path / "run")
    assert len(records) == 1 and [e["iteration"] for e in evaluations] == [0, 1]
    found = checkpoint.latest_checkpoint(tmp_path / "run")
    assert found.name == "checkpoint-000001"
    mode = (tmp_path / "run" / "recipe.yaml").stat().st_mode
    assert all(path.stat().st_mode == mode for path in (tmp_path / "run").rglob("*.safetensors"))


def test_a_resumed_run_reads_a_prompt_as_the_run_before_did(tmp_path):
    prompts = [f"two {colour} circles" for colour in ("red", "green", "blue", "yellow")]
    found = []
    for name, others in (("whole", prompts), ("resumed", prompts[2:3])):
        text = Trainer(recipe(tmp_path / name, "tiny-sd3-base")).pipeline.text
        text.encode(others)
        found.append(text.encode(prompts[2:]))
    assert torch.equal(found[0].pooled_BE, found[1].pooled_BE)
    assert torch.equal(found[0].tokens_BTE, found[1].tokens_BTE)
