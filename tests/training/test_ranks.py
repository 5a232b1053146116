"""What a role is does not depend on the number of ranks, nor its clip on the other roles."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tdm_r1.config import Optimizer
from tdm_r1.training import checkpoint, distributed
from tdm_r1.training.roles import TRAINED
from tdm_r1.training.trainer import Trainer
from tests.training.common import bright_reward, recipe, write_recipe
from tests.training.launch import assert_same_roles, launch, start_ranks

ITERATIONS = 5


def curves(folder):
    """Every logged number of every iteration but the times: {name: [ITERATIONS]}."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward_std" in line]
    assert [line["iteration"] for line in steps] == list(range(1, ITERATIONS + 1))
    return {
        name: np.array([line.get(name, np.nan) for line in steps])
        for name in {name for line in steps for name in line}
        if not name.startswith("seconds")
    }


@pytest.mark.parametrize(
    ("zero_stage", "kind"), [(0, "lora"), pytest.param(1, "full", marks=pytest.mark.slow)]
)
def test_two_ranks_are_one_with_twice_the_work(zero_stage, kind, tmp_path, sd3_dir):
    reward = bright_reward(tmp_path)
    # With this eps a step is a multiple of the gradient: none of its rounding is blown up.
    smooth = {"lr": 0.03, "eps": 1.0}
    values = {
        "reward": reward,
        "iterations": ITERATIONS,
        "checkpoint_every": ITERATIONS,
        "zero_stage": zero_stage,
        "roles": {"kind": kind, "rank": 4, "alpha": 4.0},
        "rollout": {"num_prompts": 4, "group_size": 3, "micro_groups": 1},
        "optimizers": dict.fromkeys(TRAINED["tdm_r1"], smooth),
    }
    path = write_recipe(tmp_path, sd3_dir, **values)
    arguments = ["--recipe", str(path), "--set", f"output={tmp_path / 'two'}"]
    # Once as a user starts them.
    two = launch(arguments, ranks=2) if kind == "lora" else start_ranks(arguments)
    assert two.returncode == 0, two.stderr[-3000:]
    assert_same_roles(two, TRAINED["tdm_r1"])
    one = Trainer(recipe(tmp_path, sd3_dir, **values, output=str(tmp_path / "one")))
    started = {
        name: {key: tensor.detach().clone() for key, tensor in role.tensors().items()}
        for name, role in one.roles.items()
    }
    one.run()

    alone, shared = (
        checkpoint.load_checkpoint(checkpoint.latest_checkpoint(tmp_path / run))[0]
        for run in ("one", "two")
    )
    for role in ("generator", "fake", "surrogate", "lag", "ema"):
        apart, moved = (
            torch.stack([(side[role][key] - start).norm() for key, start in begin.items()]).norm()
            for side, begin in ((shared, alone[role]), (alone, started[role]))
        )
        assert 0 < moved and apart <= 1e-3 * moved, (role, apart, moved)

    ours, theirs = curves(tmp_path / "one"), curves(tmp_path / "two")
    assert set(ours) == set(theirs) >= {f"grad_norm_{name}" for name in TRAINED["tdm_r1"]}
    for name, curve in ours.items():
        if not name.startswith("grad_norm"):  # before the first step nothing has been added up
            assert theirs[name][0] == curve[0], name
        apart, size = np.nanmax(np.abs(theirs[name] - curve)), np.nanmax(np.abs(curve))
        if name == "surrogate_margin":  # what is left of two errors, with the rounding of both
            size = max(size, 0.01 * ours["surrogate_error"].max())
        assert apart <= 5e-3 * size, (name, curve, theirs[name])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_the_norm_is_of_the_mean_gradient_before_the_clip(zero_stage, clip):
    distributed.init()
    torch.manual_seed(0)
    role = nn.Linear(6, 4, bias=False)
    x, start = torch.randn(2, 3, 6), role.weight.detach().clone()
    config = Optimizer(lr=0.1, betas=(0.0, 0.9), eps=1.0, weight_decay=0.0, clip=clip)
    engine = distributed.wrap(
        role, dict(role.named_parameters()), config, accumulation=2, zero_stage=zero_stage
    )
    for part in x:
        engine.backward(engine(part).square().sum())
        engine.step()
    gradient = sum((2 * (part @ start.T)).T @ part for part in x) / 2
    norm = gradient.norm().item()
    assert distributed.grad_norm(engine) == pytest.approx(norm, rel=1e-5)
    kept = gradient * min(1.0, clip / norm) if clip else gradient
    moved = start - 0.1 * kept / (kept.abs() + 1.0)
    with distributed.gathered(role.parameters()):
        torch.testing.assert_close(role.weight.detach(), moved, atol=1e-6, rtol=1e-5)
