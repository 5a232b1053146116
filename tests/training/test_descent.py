"""Steps that are not finite: nothing moves, it is written down, and N in a row end the run."""

import json
import math
import sys

import pytest
import torch

from tdm_r1.errors import NotFinite
from tdm_r1.training import checkpoint, distributed
from tdm_r1.training import tdm as tdm_module
from tdm_r1.training.descent import Descent
from tdm_r1.training.trainer import Trainer
from tests.training.common import recipe, write_recipe
from tests.training.launch import start_ranks


def everything(trainer):
    """All that a step changes: roles, moments, step counts."""
    found = {name: role.sha256() for name, role in trainer.roles.items()}
    for name, engine in trainer.engines.items():
        tensors, steps = distributed.optimizer_state(engine)
        found[f"optimizer-{name}"] = (
            steps,
            {k: t.double().sum().item() for k, t in tensors.items()},
        )
    return found


def records(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "evaluation" not in r]


def poison(monkeypatch, loss, when, value):
    """Let one loss function of tdm.py return `value` times its loss at the calls in `when`."""
    original, calls = getattr(tdm_module, loss), []

    def poisoned(*args, **kwargs):
        result, metrics = original(*args, **kwargs)
        calls.append(1)
        return (result * value if len(calls) in when else result), metrics

    monkeypatch.setattr(tdm_module, loss, poisoned)


@pytest.mark.parametrize(
    ("kind", "zero_stage", "loss", "value"),
    [
        ("lora", 0, "surrogate_loss", math.nan),
        ("full", 1, "fake_loss", math.inf),
        ("full", 2, "generator_loss", math.nan),
        pytest.param("full", 3, "surrogate_loss", math.nan, marks=pytest.mark.slow),
    ],
)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(
    kind, zero_stage, loss, value, tmp_path, sd3_dir, bright, monkeypatch
):
    """Bitwise, against a run whose second iteration makes no backward pass at all."""
    values = {
        "reward": bright,
        "zero_stage": zero_stage,
        "iterations": 3,
        "roles": {"kind": kind, "rank": 4, "alpha": 4.0},
        "rollout": {"num_prompts": 1, "group_size": 2, "micro_groups": 1, "steps": 2},
        "evaluation": {"families": ["counting"], "num_prompts": 2},
    }
    trainer = Trainer(recipe(tmp_path / "a", sd3_dir, **values))
    step, seen = trainer.method.step, []

    def watched(iteration):
        seen.append(everything(trainer))
        return step(iteration)

    trainer.method.step = watched
    passes = trainer.method.accumulation["generator"]
    with monkeypatch.context() as patch:
        poison(patch, loss, {passes + 1}, value)  # the first micro-step of the second iteration
        trainer.run()
    assert seen[1] == seen[2] != everything(trainer)

    other = Trainer(recipe(tmp_path / "b", sd3_dir, **values))
    update = other.method._update

    def absent(iteration, batches):
        if iteration == 1:
            raise NotFinite("left out")
        return update(iteration, batches)

    other.method._update = absent
    other.run()
    assert everything(other) == everything(trainer)
    logged = records(tmp_path / "a")
    role = loss.removesuffix("_loss")
    assert [record["iteration"] for record in logged] == [1, 2, 3]
    assert f"loss of {role}" in logged[1]["skipped"] and "gradient of" in logged[1]["skipped"]
    assert "skipped" not in logged[0] and "skipped" not in logged[2]


def test_many_in_a_row_end_the_run_with_a_checkpoint(tmp_path, sd3_dir, bright, monkeypatch):
    values = {"reward": bright, "iterations": 9, "skip_limit": 2, "checkpoint_every": 0}
    trainer = Trainer(recipe(tmp_path, sd3_dir, **values))
    before = everything(trainer)
    with monkeypatch.context() as patch:
        poison(patch, "fake_loss", range(100), math.nan)
        with pytest.raises(NotFinite, match=r"2 steps in a row were skipped.*loss of fake"):
            trainer.run()
    assert everything(trainer) == before
    assert [record["iteration"] for record in records(tmp_path)] == [1, 2]
    resumed = Trainer(recipe(tmp_path, sd3_dir, **values), resume=True)
    assert (resumed.iteration, resumed.skipped) == (2, 2)
    assert resumed.method.sampler.position == trainer.method.sampler.position > 0


def test_a_single_skip_is_forgotten_by_the_next_good_step(tmp_path, sd3_dir, bright, monkeypatch):
    values = {"reward": bright, "iterations": 4, "skip_limit": 2}
    trainer = Trainer(recipe(tmp_path, sd3_dir, **values))
    passes = trainer.method.accumulation["generator"]
    with monkeypatch.context() as patch:
        poison(patch, "fake_loss", {1, 2 * passes + 1}, math.nan)
        trainer.run()
    assert ["skipped" in record for record in records(tmp_path)] == [True, False, True, False]


def test_a_rollout_that_is_not_finite_is_skipped_with_its_prompts(
    tmp_path, sd3_dir, bright, monkeypatch
):
    trainer = Trainer(recipe(tmp_path, sd3_dir, reward=bright, iterations=2))
    noise, calls = torch.randn, []

    def overflowing(*args, **kwargs):
        calls.append(1)
        return noise(*args, **kwargs) * (math.inf if len(calls) == 1 else 1)

    before = everything(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", overflowing)
        with pytest.raises(NotFinite, match="^not finite: a rollout: .*NaN"):
            trainer.method.step(0)
    assert everything(trainer) == before
    assert trainer.method.sampler.position == trainer.recipe.rollout.num_prompts
    trainer.method.step(1)
    assert everything(trainer) != before


def test_a_finite_loss_with_a_gradient_that_is_not(tmp_path, sd3_dir, bright):
    trainer = Trainer(recipe(tmp_path, sd3_dir, reward=bright, roles={"kind": "full"}))
    engine = trainer.engines["fake"]
    descent = Descent({"fake": engine})
    parameter = next(iter(trainer.roles["fake"].tensors().values()))
    before = trainer.roles["fake"].sha256()
    for _ in range(trainer.method.accumulation["fake"]):
        zero = (parameter - parameter.detach()).flatten()[0]
        descent.backward("fake", zero.sqrt())  # 0, and its derivative is infinite
    with pytest.raises(NotFinite, match="^not finite: gradient of fake$"):
        descent.step()
    assert trainer.roles["fake"].sha256() == before
    assert all(p.grad is None for p in engine.module.parameters())


# Two recipes first; then one recipe, and NaN on the second rank only, in the second iteration.
TWO_RANKS = """import sys
sys.path[:0] = {paths!r}
from tdm_r1.config import load_recipe
from tdm_r1.errors import ConfigError
from tdm_r1.train import main
from tdm_r1.training import distributed, identity, tdm
distributed.init()
try:
    mine = ["seed=3"] if distributed.rank() == 1 else []
    identity.check_ranks(load_recipe(sys.argv[-1], mine))
except ConfigError as error:
    with open(f"{folder}/rank-{{distributed.rank()}}.txt", "w") as file:
        file.write(str(error))
original, calls = tdm.fake_loss, []
def poisoned(*args, **kwargs):
    loss, metrics = original(*args, **kwargs)
    calls.append(1)
    bad = distributed.rank() == 1 and len(calls) == 3
    return loss * (float("nan") if bad else 1), metrics
tdm.fake_loss = poisoned
sys.exit(main())
"""


@pytest.mark.slow
def test_two_ranks_act_as_one(tmp_path, sd3_dir, bright):
    path = write_recipe(
        tmp_path,
        sd3_dir,
        reward=bright,
        iterations=3,
        zero_stage=2,
        checkpoint_every=1,
        keep_checkpoints=9,
        roles={"kind": "full"},
        rollout={"num_prompts": 2, "group_size": 2, "micro_groups": 1},
        evaluation={"families": ["counting"], "num_prompts": 2},
    )
    script = tmp_path / "entry.py"
    script.write_text(TWO_RANKS.format(paths=[p for p in sys.path if p], folder=tmp_path))
    run = start_ranks(["--recipe", str(path)], script=script)
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in (0, 1):
        message = "seed must be the same on every rank; it is 0 on rank 0 and 3 on rank 1"
        assert (tmp_path / f"rank-{rank}.txt").read_text() == message
    logged = records(tmp_path)
    assert "loss of fake" in logged[1]["skipped"] and "skipped" not in logged[2]
    saved = [
        checkpoint.load_checkpoint(checkpoint.checkpoint_path(tmp_path / "run", n))[0]
        for n in (1, 2, 3)
    ]
    for group, tensors in saved[0].items():
        assert all(torch.equal(tensors[name], saved[1][group][name]) for name in tensors), group
    assert any(
        not torch.equal(tensor, saved[2]["fake"][name]) for name, tensor in saved[1]["fake"].items()
    )
