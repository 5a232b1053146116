"""The demo's pages and numbers, and (slow) the demo itself in miniature."""

import json

import numpy as np
import pytest
from PIL import Image

from tdm_r1 import demo, shapes
from tdm_r1.config import load_recipe
from tdm_r1.errors import ConfigError
from tdm_r1.pipeline import ASSETS
from tdm_r1.training import pages, trainer


def test_summary_has_what_is_promised():
    recipe = load_recipe(demo.RECIPE)
    end = {
        "reward": 0.5,
        "interval": [0.4, 0.6],
        "families": {"two": 0.5},
        "panel": {"held_out_reward": 0.8},
        "num_prompts": 256,
        "num_distinct_prompts": 41,
    }
    metrics = [{"iteration": i, "seconds": 2.0} for i in (1, 2)]
    summary = demo.summarize(recipe, {"before": end, "after": end}, 10.0, metrics)
    assert {"reward_before", "reward_after", "num_prompts", "seeds", "seconds"} <= set(summary)
    assert summary["panel_before"] == summary["panel_after"] == {"held_out_reward": 0.8}
    per_iteration = recipe.rollout.num_prompts * recipe.rollout.group_size
    assert summary["images_per_second"] == pytest.approx(per_iteration / 2.0)
    assert recipe.evaluation.num_prompts >= 256
    held = set(recipe.evaluation.held_out_families)
    assert held and not held & set(recipe.prompts.families)


def test_comparison_marks_right_and_wrong():
    rng = np.random.default_rng(0)
    good = Image.fromarray(shapes.render("a red circle", rng))
    bad = Image.fromarray(shapes.render("a blue square", rng))
    sides = ([bad], [good])
    labels = [demo.verdicts(["a red circle"], side) for side in sides]
    page = pages.comparison(["a red circle"], sides, labels)
    pixels = np.asarray(page).astype(int)
    label = pixels[30 + 128 :]
    left, right = label[:, :130], label[:, 140:]
    assert (left[..., 0] - left[..., 1]).max() > 100  # red: wrong
    assert (right[..., 1] - right[..., 0]).max() > 80  # green: right


def test_only_the_demos_own_output_is_begun_anew(tmp_path, monkeypatch):
    def refuse(recipe):
        raise ConfigError("as in training")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "Trainer", refuse)
    for output, overrides in (("runs/demo", []), ("mine", ["output=mine"])):
        (tmp_path / output / "checkpoint-000050").mkdir(parents=True)
        with pytest.raises(ConfigError, match="as in training"):
            demo.run(overrides)
    assert [path.parent.name for path in tmp_path.rglob("checkpoint-*")] == ["mine"]


@pytest.mark.slow
@pytest.mark.skipif(not (ASSETS / "tiny-sd3").is_dir(), reason="the shipped tiny-sd3 is not there")
def test_demo_in_miniature(tmp_path):
    out = tmp_path / "demo"
    small = [
        "iterations=1",
        "distillation.critic_warmup=0",
        f"output={out}",
        "evaluation.num_prompts=6",
        "rollout.num_prompts=3",
    ]
    demo.run([*small, "rollout.group_size=2", "rollout.micro_groups=3"])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_prompts"] == 6
    for name in ("before_after.png", "curves.png"):
        assert Image.open(out / name).size[0] > 300
