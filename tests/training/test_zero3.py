"""ZeRO-3 on two ranks: every role in shares, trained as one rank trains it whole."""

import json
import shutil
import sys

import pytest
import torch

from tdm_r1 import Engine
from tdm_r1.training import checkpoint, distributed
from tdm_r1.training.roles import TRAINED
from tdm_r1.training.trainer import Trainer
from tests.training.common import bright_reward, recipe, write_recipe
from tests.training.launch import start_ranks

ITERATIONS = 2
ROLES = {"generator", "fake", "surrogate", "ema", "lag", "reference"}

# Two iterations; and the second again, resumed, with a third in which the second rank meets NaN.
SCRIPT = """import json, shutil, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from tdm_r1.config import load_recipe
from tdm_r1.training import distributed, tdm
from tdm_r1.training.trainer import Trainer

def trainer(name, resume=False, **keys):
    sets = [f"{{key}}={{value}}" for key, value in keys.items()]
    output = Path(sys.argv[-1]).parent / name
    return Trainer(load_recipe(sys.argv[-1], [f"output={{output}}", *sets]), resume=resume)

def facts(run):
    roles = {{name: role for name, role in run.roles.items() if name != "base"}}
    inner = [engine.optimizer.optimizer for engine in run.engines.values()]
    return {{
        "hashes": {{name: role.sha256() for name, role in roles.items()}},
        "whole": sum(p.numel() for role in roles.values() for p in role.parameters()),
        "held": {{
            name: [[list(p.ds_shape), p.ds_tensor.numel()] for p in role.parameters()]
            for name, role in roles.items()
        }},
        "moments": [
            sum(state["exp_avg"].numel() for state in one.state.values()) for one in inner
        ],
    }}

found = {{}}
run = trainer("two")
found["start"] = facts(run)
run.run()
found["two"] = facts(run)
if distributed.rank() == 0:
    shutil.copytree(run.output / "checkpoint-000001", run.output.parent / "again/checkpoint-000001")
distributed.barrier()
original, calls = tdm.fake_loss, []
def poisoned(*args, **kwargs):
    loss, metrics = original(*args, **kwargs)
    calls.append(1)
    bad = distributed.rank() == 1 and len(calls) == 2
    return loss * (float("nan") if bad else 1), metrics
tdm.fake_loss = poisoned
run = trainer("again", resume=True, iterations=3)
run.run()
found["again"] = facts(run)
Path(f"{folder}/rank-{{distributed.rank()}}.json").write_text(json.dumps(found))
distributed.close()
"""

# One iteration of the demo's model and losses, whole and in shares. The fake score is not clipped:
# the norms that shares add up to differ in their last bit.
UNDER_AUTOCAST = """import json, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from tdm_r1.config import load_recipe
from tdm_r1.training import distributed
from tdm_r1.training.trainer import Trainer

found = {{}}
for stage in (2, 3):
    run = Trainer(load_recipe("tiny-sd3-shapes", [
        f"output={folder}/{{stage}}", f"zero_stage={{stage}}", "optimizers.fake.name=adamw",
        "optimizers.fake.clip=0", "reinforcement.transfer=0", "distillation.critic_warmup=0",
        "rollout.num_prompts=2", "rollout.group_size=2", "rollout.micro_groups=1",
    ]))
    start = {{name: run.roles[name].sha256() for name in run.engines}}
    run.method.step(0)
    found[stage] = [start, {{name: run.roles[name].sha256() for name in run.engines}}]
    assert run.recipe.precision == "bf16"
Path(f"{folder}/rank-{{distributed.rank()}}.json").write_text(json.dumps(found))
distributed.close()
"""


def values(folder, **changes):
    return {
        "reward": bright_reward(folder),
        "iterations": ITERATIONS,
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
        "zero_stage": 3,
        "roles": {"kind": "full"},
        # Of two steps only the first has a reward term: ranks ask different roles.
        "rollout": {"num_prompts": 2, "group_size": 2, "micro_groups": 1, "steps": 2},
        "distillation": {"boundaries": 1},
        "reinforcement": {"reference": "ema", "trunc_steps": 1},
        "evaluation": {"families": ["counting"], "num_prompts": 2},
        "memory": {"checkpoint_blocks": True},
        # With this eps a step is a multiple of the gradient; the clip is met.
        "optimizers": dict.fromkeys(TRAINED["tdm_r1"], {"lr": 0.03, "eps": 1.0, "clip": 0.02}),
        **changes,
    }


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "evaluation" not in record]


def test_two_ranks_share_every_role_and_train_as_one(tmp_path, sd3_dir):
    path = write_recipe(tmp_path, sd3_dir, **values(tmp_path))
    script = tmp_path / "entry.py"
    script.write_text(SCRIPT.format(paths=[p for p in sys.path if p], folder=tmp_path))
    ran = start_ranks([str(path)], script=script)
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{n}.json").read_text()) for n in (0, 1))
    start, two = first["start"]["hashes"], first["two"]["hashes"]
    assert set(two) == ROLES and all(two[name] != start[name] for name in ROLES)
    for name, one in first.items():
        assert one["hashes"] == second[name]["hashes"], name
        for side in (one, second[name]):
            assert side["whole"] == 0  # nothing stays gathered
            for shape, kept in (pair for held in side["held"].values() for pair in held):
                assert kept == -(-torch.Size(shape).numel() // 2)
    shares = sum(kept for _, kept in first["two"]["held"]["generator"])
    assert first["two"]["moments"] == second["two"]["moments"] == [shares] * 3
    assert first["again"]["hashes"] == two
    resumed, spoilt = records(tmp_path / "again")
    assert "skipped" not in resumed and "loss of fake" in spoilt["skipped"]

    whole = values(tmp_path, zero_stage=2, output=f"{tmp_path}/one", memory={})
    one = Trainer(recipe(tmp_path, sd3_dir, **whole))
    started = {
        name: {key: tensor.detach().clone() for key, tensor in role.tensors().items()}
        for name, role in one.roles.items()
    }
    one.run()
    (alone, steps), (shared, same) = (
        checkpoint.load_checkpoint(checkpoint.latest_checkpoint(tmp_path / run))
        for run in ("one", "two")
    )
    for name in ROLES:
        apart, moved = (
            torch.stack([(side[name][key] - begin[key]).norm() for key in begin]).norm()
            for side, begin in ((shared, alone[name]), (alone, started[name]))
        )
        assert 0 < moved and apart <= 1e-3 * moved, (name, apart, moved)
    for name in TRAINED["tdm_r1"]:
        group = f"optimizer-{name}"
        assert steps[group] == same[group] and set(shared[group]) == set(alone[group])
        ours, theirs = (
            [record[f"grad_norm_{name}"] for record in records(tmp_path / run)]
            for run in ("one", "two")
        )
        assert theirs == pytest.approx(ours, rel=5e-3) and max(ours) > 0.02, name

    exported = Engine.from_pretrained(tmp_path / "two" / "model", dtype="float32")
    state = exported.pipeline.transformer.state_dict()
    assert all(torch.equal(state[key], t.half().float()) for key, t in shared["ema"].items())

    shutil.copytree(tmp_path / "two" / "checkpoint-000002", tmp_path / "less" / "checkpoint-000002")
    less = Trainer(
        recipe(tmp_path, sd3_dir, **values(tmp_path, output=f"{tmp_path}/less")), resume=True
    )
    assert {name: less.roles[name].sha256() for name in ROLES} == two
    moments, counts = distributed.optimizer_state(less.engines["fake"])
    assert counts == same["optimizer-fake"]
    assert all(torch.equal(moments[key], t) for key, t in shared["optimizer-fake"].items())


@pytest.mark.slow
def test_shares_of_a_bf16_run_are_those_of_the_whole(tmp_path):
    script = tmp_path / "entry.py"
    script.write_text(UNDER_AUTOCAST.format(paths=[p for p in sys.path if p], folder=tmp_path))
    ran = start_ranks([], script=script)
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{n}.json").read_text()) for n in (0, 1))
    assert first == second
    (start, whole), (same, shares) = first["2"], first["3"]
    assert start == same and set(start) == set(TRAINED["tdm_r1"])
    assert whole == shares and all(whole[name] != start[name] for name in start)


def test_the_last_share_of_an_odd_tensor_is_padded(monkeypatch):
    parameter, value = torch.zeros(0), torch.arange(1.0, 8.0).reshape(7, 1)
    assert distributed.share(parameter, value) is value  # not cut
    parameter.ds_tensor = torch.empty(4)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank, expected in ((0, [1.0, 2.0, 3.0, 4.0]), (1, [5.0, 6.0, 7.0, 0.0])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert distributed.share(parameter, value).tolist() == expected
