"""Recipes: strict keys, overrides, and that every shipped one is whole."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml

from tdm_r1 import flow
from tdm_r1.config import RECIPES, load_recipe, save_recipe
from tdm_r1.errors import ConfigError
from tdm_r1.recipe_checks import validate

MINIMAL = {"model": "tiny-sd3", "method": "sft", "iterations": 1, "output": "runs/x"}


def write(tmp_path, **values):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **values}))
    return path


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_shipped_recipes_load_and_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    keys = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    own = {"output"} if "extends" in keys else {"model", "iterations", "output", "seed"}
    assert own <= set(keys)
    save_recipe(recipe, tmp_path / "copy.yaml")
    assert load_recipe(tmp_path / "copy.yaml") == recipe


def test_overrides_are_typed(tmp_path):
    recipe = load_recipe(
        write(tmp_path),
        [
            "rollout.group_size=7",
            "optimizers.fake.lr=1e-5",
            "prompts.families=[two, single]",
            "lora=a.b",
        ],
    )
    assert recipe.rollout.group_size == 7
    assert recipe.optimizers.fake.lr == 1e-5
    assert recipe.prompts.families == ("two", "single")
    assert recipe.lora == "a.b"


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"itertions": 3}, [], "unknown recipe key 'itertions'.*Did you mean 'iterations'"),
        ({"rollout": {"groupsize": 3}}, [], "'rollout.groupsize'.*Did you mean 'group_size'"),
        ({"method": "tdmr1"}, [], "method must be one of sft, tdm, tdm_r1.*Did you mean 'tdm_r1'"),
        ({"iterations": "many"}, [], "iterations must be of type int; got 'many'"),
        ({"iterations": True}, [], "iterations must be of type int"),
        ({"iterations": 0}, [], "iterations must be at least 1"),
        ({"evaluation": {"num_prompts": -1}}, [], "num_prompts must be at least 0; got -1"),
        ({"roles": "lora"}, [], "roles must be a mapping"),
        ({"zero_stage": 4}, [], "zero_stage must be one of 0, 1, 2, 3"),
        (
            {"zero_stage": 3},
            [],
            "needs roles.kind 'full'.*got roles.kind 'lora': set zero_stage to",
        ),
        (
            {"zero_stage": 3, "compile": True, "roles": {"kind": "full"}},
            [],
            "compile false.*got compile true: set zero_stage to 0, 1 or 2",
        ),
        ({"optimizers": {"fake": {"name": "moun"}}}, [], "fake.name.*Did you mean 'muon'"),
        ({"optimizers": {"fake": {"name": "muon"}}, "zero_stage": 2}, [], "needs zero_stage 0"),
        ({}, ["iterations"], "--set wants key=value"),
        ({}, ["model.x=1"], "'model' is not a group of keys"),
        ({"method": "tdm_r1", "rollout": {"group_size": 1}}, [], "group_size must be at least 2"),
        ({"distillation": {"boundaries": 9}}, [], "boundaries must be from 1 to rollout.steps = 4"),
        (
            {"method": "tdm", "iterations": 3, "distillation": {"critic_warmup": 3}},
            [],
            "must be from 0 to 2.*got 3",
        ),
        (
            {"method": "sft", "distillation": {"critic_warmup": 1}},
            [],
            "critic_warmup must be from 0 to 0.*method sft",
        ),
        ({"reinforcement": {"transfer": 0.5}}, [], "kind 'full' and .* 0; got 'lora' and 0"),
        (
            {"reinforcement": {"transfer": 0.5}, "roles": {"kind": "full"}, "zero_stage": 1},
            [],
            "transfer adds .*got 'full' and 1",
        ),
        ({}, ["optimizers.fake.clip=-1"], "^optimizers.fake.clip must be at least 0; got -1.0$"),
        ({}, ["optimizers.fake.lr=.inf"], "fake.lr must be finite and at least 0; got inf"),
        ({}, ["optimizers.fake.betas=[0.9, 1]"], r"betas must be in \[0, 1\); got 1.0"),
        ({}, ["optimizers.fake.betas=[0.9]"], "betas must be two numbers"),
        ({}, ["optimizers.surrogate.eps=0"], "surrogate.eps must be above 0; got 0.0"),
        ({}, ["ema_decay=1.5"], r"^ema_decay must be in \[0, 1\]; got 1.5$"),
        ({}, ["roles.rank=0"], "roles.rank must be at least 1; got 0"),
        ({}, ["reinforcement.transfer=.nan"], r"transfer must be finite and in \[0, 1\]; got nan"),
        ({}, ["reinforcement.t_min=0.995"], "t_min must be from 0 to 0.98, .*got 0.995"),
        (
            {"method": "tdm"},
            ["prompts.split=train/1"],
            "'test' is not the quarter .* 'train/1' holds",
        ),
        (
            {"method": "tdm"},
            ["evaluation.split=test/3"],
            "'test/3' is not .* 'train' holds out: end both alike",
        ),
        ({}, ["prompts.families=[a,b"], r"--set prompts.families: '\[a,b' is not YAML: while"),
    ],
)
def test_bad_recipes_are_refused(values, overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, **values), overrides)


def numbers(tree, prefix=""):
    """(dotted key, whole number or not, one of several or not) of every number in a recipe."""
    for key, value in tree.items():
        first = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(first, (int, float)) and not isinstance(first, bool):
            yield prefix + key, isinstance(first, int), isinstance(value, tuple)


def test_no_number_of_a_recipe_may_be_negative_or_not_finite(tmp_path):
    path = write(tmp_path)
    found = list(numbers(dataclasses.asdict(load_recipe(path))))
    assert len(found) > 50
    for key, whole, several in found:
        for bad in ("-1",) if whole else ("-1", "-1e-9", ".nan", ".inf"):
            value = f"[{bad}, 0.5]" if several else bad
            with pytest.raises(ConfigError, match=f"^{key} must be "):
                load_recipe(path, [f"{key}={value}"])


def test_the_ends_of_ranges_are_allowed(tmp_path):
    ends = ["optimizers.fake.clip=0", "ema_decay=1", "data.caption_dropout=0", "sigma_shift=0"]
    ends += ["reinforcement.transfer=1", "roles.kind=full", "checkpoint_every=0", "roles.rank=1"]
    assert load_recipe(write(tmp_path), ends).optimizers.fake.clip == 0


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", ["t_min", "t_min_reward"])
def test_a_lowest_level_is_refused_where_none_can_be_drawn_above_it(name, shift, tmp_path):
    recipe = dataclasses.replace(load_recipe(write(tmp_path)), sigma_shift=shift)
    verdicts = set()
    for level in np.linspace(0.9, 0.9999, 200).tolist():
        rl = dataclasses.replace(recipe.reinforcement, **{name: level})
        try:
            flow.sigma_above(level, shift, torch.zeros(1))
        except ValueError:
            verdicts.add("refused")
            with pytest.raises(ConfigError, match=f"reinforcement.{name} must be from 0 to"):
                validate(dataclasses.replace(recipe, reinforcement=rl))
        else:
            verdicts.add("drawn")
            validate(dataclasses.replace(recipe, reinforcement=rl))
    assert verdicts == {"refused", "drawn"}


def test_missing_keys_files_and_names(tmp_path):
    (tmp_path / "empty.yaml").write_text("model: tiny-sd3\n")
    with pytest.raises(ConfigError, match="lacks the key.* method, iterations, output"):
        load_recipe(tmp_path / "empty.yaml")
    with pytest.raises(ConfigError, match="Did you mean 'tiny-sd3-shapes'"):
        load_recipe("tiny-sd3-shape")
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_recipe(tmp_path / "bad.yaml")


def test_a_recipe_extends_a_shipped_one_key_by_key(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: sd35m-ocr\noutput: runs/mine\nrollout: {micro_groups: 1}\n")
    mine, whole = load_recipe(file, ["seed=3"]), load_recipe("sd35m-ocr")
    assert (mine.output, mine.seed, mine.rollout.micro_groups) == ("runs/mine", 3, 1)
    assert mine.rollout.num_prompts == whole.rollout.num_prompts
    assert mine.reinforcement == whole.reinforcement
    save_recipe(mine, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == mine
    for parent in ("sd35m-orc", str(file)):
        file.write_text(f"extends: {parent}\n")
        with pytest.raises(ConfigError, match="extends .* which is no other shipped recipe"):
            load_recipe(file)
