"""Runs that go wrong or go too far: the guard, the best checkpoint, stops between two steps."""

import json
import signal

import pytest
import torch

from tdm_r1 import Engine
from tdm_r1.errors import ConfigError, RewardError, SaveError, TdmError
from tdm_r1.training import checkpoint, distributed, report
from tdm_r1.training.trainer import Interrupted, Trainer
from tests.rewards.test_remote import Server, brightness
from tests.training.common import recipe

# Rewards by the number of the call, whatever the picture: one call per iteration or evaluation.
SCRIPTED = """training, held_out = {training!r}, {held_out!r}
def train(images, prompts):
    start = training.pop(0)
    return [start + 0.01 * i for i in range(len(images))]
def judge(images, prompts):
    return [held_out.pop(0)] * len(images)
"""


def scripted(folder, model, training, held_out, **values):
    """A recipe with an evaluation after every iteration."""
    file = folder / "scripted.py"
    file.write_text(SCRIPTED.format(training=list(training), held_out=list(held_out)))
    evaluation = {"families": ["counting"], "num_prompts": 2, "every": 1, "reward": "jpeg"}
    evaluation |= {"held_out_reward": f"{file}:judge", "guard": values.pop("guard", 0)}
    rollout = {"num_prompts": 1, "group_size": 2, "micro_groups": 1, "steps": 2}
    settings = {"evaluation": evaluation, "rollout": rollout, "reward": f"{file}:train"}
    return recipe(folder, model, **settings | values)


def names(folder):
    return sorted(path.name for path in (folder / "run").glob("checkpoint-*"))


def lines(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_pruning_keeps_the_best_by_the_held_out_scorer(tmp_path, sd3_dir):
    values = {"iterations": 4, "checkpoint_every": 3, "keep_checkpoints": 1}
    training, held_out = [0.5] * 4, [0.9, 0.2, 0.7, 0.3, 0.1]
    trainer = Trainer(scripted(tmp_path, sd3_dir, training, held_out, **values))
    results = trainer.run()
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000004"]
    assert trainer.history.best == 2 and results["stopped"] is None
    assert results["before"]["panel"]["held_out_reward"] == 0.9
    assert results["after"]["panel"]["held_out_reward"] == 0.1
    assert {"sharpness", "saturation"} <= set(results["after"]["panel"])
    for name in ("curves.png", "samples/000000.png", "samples/000004.png"):
        assert (tmp_path / "run" / name).is_file()


def test_the_guard_ends_the_run_and_exports_the_best(tmp_path, sd3_dir):
    training, held_out = [0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.6, 0.5]
    values = {"iterations": 9, "guard": 2, "checkpoint_every": 5}
    trainer = Trainer(scripted(tmp_path, sd3_dir, training, held_out, **values))
    results = trainer.run()
    assert trainer.iteration == 3
    assert "rose (0.105 -> 0.305) while the held-out panel fell at 2" in results["stopped"]
    assert "checkpoint-000001, whose EMA weights are exported" in results["stopped"]
    assert names(tmp_path) == ["checkpoint-000001", "checkpoint-000003"]
    best, _ = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoint-000001")
    for name, tensor in trainer.roles["ema"].tensors().items():
        assert torch.equal(tensor, best["ema"][name])
    Engine.from_pretrained(sd3_dir, lora=tmp_path / "run")  # a usable export

    again = scripted(tmp_path, sd3_dir, training[3:], held_out[4:], **values)
    resumed = Trainer(again, resume=True)  # the user's word counts for more: one more evaluation
    assert resumed.iteration == 3
    assert "fell at 2" in resumed.run()["stopped"] and resumed.iteration == 4


def test_a_stop_before_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, sd3_dir):
    values = {"iterations": 3, "checkpoint_every": 0}
    trainer = Trainer(scripted(tmp_path, sd3_dir, [0.1, 0.2], [0.9, 0.8, 0.7, 0.6], **values))
    step = trainer.method.step

    def last(iteration):
        metrics = step(iteration)
        if iteration == 1:
            trainer._on_signal(signal.SIGTERM, None)
        return metrics

    trainer.method.step = last
    with pytest.raises(Interrupted, match="SIGTERM after iteration 2"):
        trainer.run()
    assert trainer.history.seen(1) and not trainer.history.seen(2)
    resumed = Trainer(
        scripted(tmp_path, sd3_dir, [0.3], [0.7, 0.6], **values | {"iterations": 3}), resume=True
    )
    results = resumed.run()
    evaluated = [line["iteration"] for line in lines(tmp_path) if "evaluation" in line]
    assert evaluated == [0, 1, 2, 3]
    found = [entry["training_reward"] for entry in resumed.history.entries]
    assert found[0] is None and found[1:] == pytest.approx([0.105, 0.205, 0.305])
    assert results["before"]["panel"]["held_out_reward"] == 0.9


@pytest.mark.parametrize(("every", "left"), [(2, [2, 3]), (50, [3]), (0, [])])
def test_the_last_iteration_leaves_a_checkpoint(every, left, tmp_path, sd3_dir, monkeypatch):
    values = {"method": "sft", "iterations": 3, "checkpoint_every": every}
    trainer = Trainer(recipe(tmp_path, sd3_dir, **values))

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "export", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.run()
    assert names(tmp_path) == [f"checkpoint-{number:06d}" for number in left]
    if left:
        resumed = Trainer(recipe(tmp_path, sd3_dir, **values), resume=True)
        assert resumed.iteration == 3
        resumed.run()
        assert resumed.roles["ema"].sha256() == trainer.roles["ema"].sha256()
        Engine.from_pretrained(sd3_dir, lora=tmp_path / "run")


def test_a_signal_during_the_export_does_not_end_it(tmp_path, sd3_dir, monkeypatch):
    trainer = Trainer(recipe(tmp_path, sd3_dir, method="sft", iterations=1))
    outside, export = [], trainer.export

    def signalled():
        signal.raise_signal(signal.SIGTERM)
        export()

    def handler(number, frame):
        outside.append(number)

    monkeypatch.setattr(trainer, "export", signalled)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        trainer.run()
        assert signal.getsignal(signal.SIGTERM) is handler and not outside
    finally:
        signal.signal(signal.SIGTERM, before)
    Engine.from_pretrained(sd3_dir, lora=tmp_path / "run")


def test_a_run_resumed_before_its_first_iteration_keeps_its_pages(tmp_path, sd3_dir):
    trainer = Trainer(scripted(tmp_path, sd3_dir, [], [0.9], iterations=1))
    trainer._on_signal(signal.SIGTERM, None)
    with pytest.raises(Interrupted, match="SIGTERM after iteration 0"):
        trainer.run()
    samples = tmp_path / "run" / "samples"
    pages = {name: (samples / name).read_bytes() for name in ("before.png", "000000.png")}
    Trainer(scripted(tmp_path, sd3_dir, [0.1], [0.8], iterations=1), resume=True).run()
    assert {name: (samples / name).read_bytes() for name in pages} == pages
    assert (samples / "000001.png").is_file()


def test_a_reward_server_that_dies_costs_nothing(tmp_path, sd3_dir, monkeypatch):
    """The run ends with a checkpoint; resumed when the server is back, it ends where it would."""
    monkeypatch.setenv("no_proxy", "*")

    def whole_run(folder, url, **options):
        reward = f"remote(url={url},retries=1,backoff=0.01)"
        rollout = {"num_prompts": 1, "group_size": 2, "micro_groups": 1, "steps": 2}
        evaluation = {"families": ["counting"], "num_prompts": 2, "reward": "jpeg"}
        values = {"reward": reward, "rollout": rollout, "evaluation": evaluation, "iterations": 3}
        return Trainer(recipe(folder, sd3_dir, **values, checkpoint_every=0), **options)

    steady = Server(brightness)
    whole = whole_run(tmp_path / "a", steady.url)
    whole.run()
    server = Server(brightness, brightness, (500, b"out of memory"))
    try:
        trainer = whole_run(tmp_path / "b", server.url)
        with pytest.raises(RewardError, match="is gone: 2 attempts, .*HTTP 500.*out of memory"):
            trainer.run()
        assert trainer.iteration == 2 and names(tmp_path / "b") == ["checkpoint-000002"]
        server.answers = [brightness]
        resumed = whole_run(tmp_path / "b", server.url, resume=True)
        resumed.run()
    finally:
        steady.stop()
        server.stop()
    for name, role in whole.roles.items():
        assert role.sha256() == resumed.roles[name].sha256(), name


def test_a_disk_that_is_full_ends_the_run_in_one_line(tmp_path, sd3_dir, monkeypatch):
    values = {"iterations": 2, "checkpoint_every": 1, "keep_checkpoints": 2}
    trainer = Trainer(scripted(tmp_path, sd3_dir, [0.1, 0.2], [0.9] * 3, **values))
    write, calls = checkpoint._write, []

    def full(staging, tensors, state):
        calls.append(1)
        write(staging, tensors, state)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(staging))

    monkeypatch.setattr(checkpoint, "_write", full)
    message = r"checkpoint-000002 could not be written: .*No space left.*checkpoint-000001 is whole"
    with pytest.raises(SaveError, match=message):
        trainer.run()
    monkeypatch.undo()
    again = scripted(tmp_path, sd3_dir, [0.2], [0.8, 0.7], **values)
    resumed = Trainer(again, resume=True)
    assert resumed.iteration == 1 and not resumed.history.seen(1)  # saved, then evaluated
    resumed.run()
    assert [entry["iteration"] for entry in resumed.history.entries] == [0, 1, 2]


def test_an_evaluation_that_fails_leaves_a_checkpoint(tmp_path, sd3_dir):
    trainer = Trainer(scripted(tmp_path, sd3_dir, [0.1], [0.9], checkpoint_every=0))
    evaluate = trainer.evaluator.run

    def failing(role):
        if trainer.iteration:
            raise MemoryError("too many pictures")
        return evaluate(role)

    trainer.evaluator.run = failing
    with pytest.raises(MemoryError, match="too many pictures"):
        trainer.run()
    assert names(tmp_path) == ["checkpoint-000001"]


@pytest.mark.parametrize("kind", [RewardError, TdmError])
def test_what_fails_on_the_first_rank_fails_on_the_others(kind, monkeypatch, tmp_path, sd3_dir):
    trainer = Trainer(scripted(tmp_path, sd3_dir, [], []))
    monkeypatch.setattr(distributed, "gather", lambda value: [(kind, "it broke"), value])
    with pytest.raises(kind, match="saving failed on rank 0: it broke"):
        trainer._fail_together(None, "saving")


def test_a_tracker_that_is_missing_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    from tdm_r1.train import main
    from tests.training.common import write_recipe

    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    path = write_recipe(tmp_path, "no/such/model", report_to=["wandb"])
    assert main(["--recipe", str(path)]) == 2
    assert "error: report_to: 'wandb' is not installed; run: pip install wandb" in (
        capsys.readouterr().err
    )


def test_a_guard_needs_something_to_compare(tmp_path):
    with pytest.raises(ConfigError, match="evaluation.guard needs a training reward"):
        recipe(tmp_path, "tiny-sd3", evaluation={"guard": 2})
    with pytest.raises(ConfigError, match="report_to must be one of.*Did you mean 'wandb'"):
        recipe(tmp_path, "tiny-sd3", report_to=["wandbs"])
