"""tdm_r1.training.checkpoint: round trips, crashes at every moment, damage of every kind."""

import json
import os
import shutil

import pytest
import torch

from tdm_r1.errors import LoadError
from tdm_r1.files import sha256
from tdm_r1.training import checkpoint
from tdm_r1.training.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(10, generator=generator)
    return {
        "generator": {
            "blocks.0.to_q.lora_A": torch.randn(4, 3, generator=generator),
            "half": torch.randn(5, generator=generator).bfloat16(),
            "transposed": torch.randn(3, 4, generator=generator).T,
        },
        "optimizer.generator": {
            "view.0": buffer[:4],
            "view.1": buffer[4:],
            "whole": buffer,
            "tied": buffer,
            "step": torch.tensor(7),
        },
        "rng": {"torch": torch.Generator().manual_seed(3).get_state(), "none": torch.zeros(0)},
        "offset": {"view": buffer[3:7]},
        "empty": {},
    }


STATE = {"step": 12, "lr": 0.1 + 0.2, "prompts": {"position": 3, "order": [2, 0, 1]}, "note": "é"}


def save(run_dir, step, **options):
    return save_checkpoint(checkpoint_path(run_dir, step), tensors(step), STATE, **options)


def same(left, right):
    assert left.keys() == right.keys()
    for group in left:
        assert left[group].keys() == right[group].keys()
        for name, tensor in left[group].items():
            other = right[group][name]
            assert tensor.dtype == other.dtype and torch.equal(tensor, other), (group, name)
    return True


def test_everything_comes_back_bitwise(tmp_path):
    path = save(tmp_path / "run", 12)
    loaded, state = load_checkpoint(path)
    assert path.name == "checkpoint-000012"
    assert same(loaded, tensors(12)) and state == STATE
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-000012"]


def test_a_training_run_resumed_from_a_checkpoint_is_bitwise_the_uninterrupted_one(tmp_path):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model, optimizer, generator, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 3, generator=generator)).square().sum().backward()
            optimizer.step()

    model, optimizer = build()
    generator = torch.Generator().manual_seed(1)
    train(model, optimizer, generator, 3)
    moments = {
        f"{i}.{name}": value
        for i, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
    }
    groups = {
        "model": model.state_dict(),
        "optimizer": moments,
        "rng": {"data": generator.get_state()},
    }
    save_checkpoint(tmp_path / "checkpoint-3", groups, optimizer.state_dict()["param_groups"][0])
    train(model, optimizer, generator, 3)

    resumed, resumed_optimizer = build()
    loaded, param_group = load_checkpoint(tmp_path / "checkpoint-3")
    resumed.load_state_dict(loaded["model"])
    slots = {}
    for key, value in loaded["optimizer"].items():
        index, name = key.split(".")
        slots.setdefault(int(index), {})[name] = value
    resumed_optimizer.load_state_dict({"state": slots, "param_groups": [param_group]})
    resumed_generator = torch.Generator()
    resumed_generator.set_state(loaded["rng"]["data"])
    train(resumed, resumed_optimizer, resumed_generator, 3)
    assert same({"": dict(resumed.state_dict())}, {"": dict(model.state_dict())})


def test_loading_does_not_tie_what_was_tied(tmp_path):
    loaded, _ = load_checkpoint(save(tmp_path, 1))
    loaded["optimizer.generator"]["whole"].zero_()
    assert loaded["optimizer.generator"]["tied"].any()


def test_latest_is_the_highest_step_not_the_newest_file(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 1_000_000, 30):
        save(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-9999999").write_text("a file")
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1_000_000)


def test_keep_last_deletes_the_lowest_steps_and_nothing_else(tmp_path):
    (tmp_path / "checkpoint-notes").mkdir()
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2)
    names = ["checkpoint-000003", "checkpoint-000004", "checkpoint-notes"]
    assert sorted(os.listdir(tmp_path)) == names


def test_the_best_checkpoint_outlives_its_age(tmp_path):
    best = checkpoint_path(tmp_path, 2)
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep_last=2, keep=best)
    names = ["checkpoint-000002", "checkpoint-000004", "checkpoint-000005"]
    assert sorted(os.listdir(tmp_path)) == names
    save(tmp_path, 6, keep_last=2, keep=checkpoint_path(tmp_path, 6))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-000005", "checkpoint-000006"]


def test_keep_last_never_deletes_what_was_just_written(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    save(tmp_path, 5, keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-000005", "checkpoint-000020"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    path = save(tmp_path, 1)
    save_checkpoint(path, {"generator": {"x": torch.ones(2)}}, {"again": True})
    loaded, state = load_checkpoint(path)
    assert list(loaded) == ["generator"] and state == {"again": True}
    assert os.listdir(tmp_path) == [path.name]


class Killed(BaseException):
    """What no `except Exception` may swallow."""


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("moment", range(14))
def test_a_crash_at_any_moment_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, moment, replace):
    """Kill before the n-th operation on the disk; after that even the clean-up does not run."""
    save(tmp_path, 1)
    step, calls = 1 if replace else 2, 0

    def deadly(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", deadly(checkpoint.save_tensors))
        patch.setattr(checkpoint, "_fsync", deadly(checkpoint._fsync))
        patch.setattr(checkpoint.os, "rename", deadly(os.rename))
        patch.setattr(
            checkpoint.shutil, "rmtree", deadly_rmtree(shutil.rmtree, lambda: calls > moment)
        )
        try:
            save_checkpoint(checkpoint_path(tmp_path, step), tensors(50), {"step": "new"})
        except Killed:
            pass
    found = latest_checkpoint(tmp_path)
    loaded, state = load_checkpoint(found)
    expected = tensors(50) if state == {"step": "new"} else tensors(1)
    assert same(loaded, expected)

    save(tmp_path, 3)  # the next save clears the debris
    assert not list(tmp_path.glob(".tmp-*"))
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 3)


def deadly_rmtree(rmtree, dead):
    def wrapper(*args, **kwargs):
        if dead():
            raise Killed
        return rmtree(*args, **kwargs)

    return wrapper


def test_a_failed_write_raises_and_leaves_no_debris(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert os.listdir(tmp_path) == ["checkpoint-000001"]


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "run" / "checkpoint-1", tensors(), {"x": torch.ones(1)})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden"])
def test_a_group_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="group name"):
        save_checkpoint(tmp_path / "checkpoint-1", {name: {}}, {})


def test_keep_last_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last = 0"):
        save(tmp_path, 1, keep_last=0)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_manifest(path, **changes):
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | changes))


DAMAGE = {
    "missing group": (
        lambda p: (p / "generator.safetensors").unlink(),
        r"generator\.safetensors is missing",
    ),
    "truncated group": (
        lambda p: truncate(p / "generator.safetensors"),
        r"generator\.safetensors has \d+ bytes",
    ),
    "no state": (lambda p: (p / "state.json").unlink(), "has no state.json"),
    "truncated state": (lambda p: truncate(p / "state.json"), r"state\.json cannot be read"),
    "not an object": (lambda p: (p / "state.json").write_text("[]"), "format None"),
    "no groups": (lambda p: edit_manifest(p / "state.json", groups=None), "lacks its list"),
    "bad groups": (lambda p: edit_manifest(p / "state.json", groups={"a": 1}), "lacks its list"),
    "future format": (
        lambda p: edit_manifest(p / "state.json", format=2),
        "format 2; this version reads 1",
    ),
    "no directory": (shutil.rmtree, "is not a checkpoint"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_passed_over(tmp_path, kind):
    before, path = save(tmp_path, 1), save(tmp_path, 2)
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(LoadError, match=message):
        load_checkpoint(path)
    assert latest_checkpoint(tmp_path) == before


def test_a_flipped_bit_is_found(tmp_path):
    path = save(tmp_path, 1)
    flip(path / "generator.safetensors")
    with pytest.raises(LoadError, match=r"generator\.safetensors is damaged: its SHA-256"):
        load_checkpoint(path)


def test_a_file_that_was_never_safetensors_is_a_load_error(tmp_path):
    path = save(tmp_path, 1)
    file = path / "generator.safetensors"
    file.write_bytes(b"not safetensors")
    groups = json.loads((path / "state.json").read_text())["groups"]
    groups["generator"] = {"bytes": 15, "sha256": sha256(file)}
    edit_manifest(path / "state.json", groups=groups)
    with pytest.raises(LoadError, match=r"generator\.safetensors cannot be read"):
        load_checkpoint(path)


def test_what_was_renamed_aside_yields_to_what_took_its_place(tmp_path):
    path = save(tmp_path, 1)
    aside = path.with_name(path.name + ".old")
    shutil.copytree(path, aside)
    assert latest_checkpoint(tmp_path) == path
    shutil.rmtree(path)
    assert latest_checkpoint(tmp_path) == aside
