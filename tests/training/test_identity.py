"""Whether two recipes are one run."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tdm_r1.config import Optimizers, Recipe, Roles, Rollout, load_recipe
from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.training import distributed, identity

PATH = Path("run/checkpoint-000001")


@pytest.fixture
def recipe():
    return load_recipe("tiny-sd3-shapes")


def test_every_setting_has_a_dotted_key(recipe):
    found = identity.values(recipe)
    assert found["optimizers.fake.betas"] == [0.0, 0.999]
    assert found["prompts.families"] == ["attribution"]
    fixed = [key for key in identity.FIXED + identity.FREE if key not in found]
    known = {name.split(".")[0] for name in found}
    assert set(fixed) <= known  # sections; nothing is misspelt
    assert isinstance(recipe, Recipe)


def test_ranks_must_agree(recipe, monkeypatch):
    other = replace(recipe, roles=replace(recipe.roles, rank=9))
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value])
    identity.check_ranks(recipe)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value, identity.values(other)])
    with pytest.raises(ConfigError, match="roles.rank must be .* 32 on rank 0 and 9 on rank 2"):
        identity.check_ranks(recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "tiny-zimage"}, "with model 'tiny-sd3', this is 'tiny-zimage'"),
        ({"seed": 4}, "with seed 0, this is 4"),
        ({"reward": "ocr"}, "with reward 'shapes:strict', this is 'ocr'"),
        ({"roles": Roles(kind="lora")}, "with roles.kind 'full', this is 'lora'"),
        ({"rollout": Rollout(16, 9, 4)}, "with rollout.group_size 12, this is 9"),
        ({"rollout": Rollout(16, 12, 4, 3)}, "with rollout.steps 4, this is 3"),
        ({"optimizers": Optimizers()}, "with optimizers.fake.name 'muon', this is 'adamw'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(recipe, change, message):
    saved = identity.values(recipe)
    with pytest.raises(LoadError, match=message):
        identity.check_checkpoint(replace(recipe, **change), saved, PATH)


def test_what_may_change_is_said_or_goes_without_saying(recipe, caplog):
    saved = identity.values(recipe)
    changed = replace(recipe, iterations=99, zero_stage=2, ema_decay=0.5)
    with caplog.at_level(logging.WARNING):
        identity.check_checkpoint(changed, saved, PATH)
    assert [record.getMessage() for record in caplog.records] == [
        f"{PATH} was written with ema_decay 0.9; from here on it is 0.5"
    ]
    del saved["seed"]  # a checkpoint from before there was such a key
    identity.check_checkpoint(recipe, saved, PATH)


def test_a_run_that_failed_may_go_on_in_smaller_steps(recipe, caplog):
    smaller = replace(recipe, rollout=replace(recipe.rollout, micro_groups=1))
    identity.check_checkpoint(smaller, identity.values(recipe), PATH)
    assert "rollout.micro_groups 4; from here on it is 1" in caplog.text


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("remote(url=http://a/s,timeout=60)", "remote(url=http://b:1/s, timeout=9)", True),
        ("0.5*remote(url=http://a)+ocr", "0.5*remote(retries=1,url=http://b)+ocr", True),
        ("0.5*remote(url=http://a)+ocr", "0.6*remote(url=http://a)+ocr", False),
        ("remote(url=http://a)", "geneval", False),
        ("geneval(detector=a)", "geneval(detector=b)", False),
    ],
)
def test_a_reward_may_move_to_another_server(recipe, before, now, same, caplog):
    saved = identity.values(replace(recipe, reward=before))
    if same:
        identity.check_checkpoint(replace(recipe, reward=now), saved, PATH)
        assert f"reward {before!r}; from here on it is {now!r}" in caplog.text
    else:
        with pytest.raises(LoadError, match="written with reward"):
            identity.check_checkpoint(replace(recipe, reward=now), saved, PATH)


def test_a_checkpoint_that_says_nothing_is_refused(recipe):
    with pytest.raises(LoadError, match="does not say which recipe"):
        identity.check_checkpoint(recipe, None, PATH)
