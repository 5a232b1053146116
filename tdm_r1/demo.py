"""`python -m tdm_r1 demo`: a tiny 4-step generator learns from a checker that no gradient reaches.

Evaluates, trains with the recipe `tiny-sd3-shapes`, evaluates again on the same held-out prompts
and noise, and writes summary.json and before_after.png beside what every run writes into its
`output`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tdm_r1 import shapes
from tdm_r1.config import Recipe, load_recipe
from tdm_r1.training import pages
from tdm_r1.training.curves import read_metrics
from tdm_r1.training.evaluate import NUM_SHOWN, reward_of

RECIPE, OUTPUT = "tiny-sd3-shapes", "runs/demo"


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the demo; returns what summary.json holds. `overrides` are `a.b=value` recipe changes.

    Raises ConfigError for another output than the demo's own that holds checkpoints.
    """
    from tdm_r1.training.trainer import Trainer

    recipe = load_recipe(RECIPE, [f"output={OUTPUT}", *overrides])
    start = time.perf_counter()
    if Path(recipe.output) == Path(OUTPUT):  # the demo's own, which always starts anew
        for stale in Path(OUTPUT).glob("checkpoint-*"):
            shutil.rmtree(stale)
    trainer = Trainer(recipe)
    shown = trainer.evaluator.prompts[:NUM_SHOWN]
    seed = recipe.evaluation.seed
    before = trainer.evaluator.pictures(trainer.roles["ema"], shown, seed)
    results = trainer.run()
    after = trainer.evaluator.pictures(trainer.roles["ema"], shown, seed)
    seconds = time.perf_counter() - start
    output = Path(recipe.output)
    summary = summarize(recipe, results, seconds, read_metrics(output)[0])
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    sides = (before, after)
    page = pages.comparison(shown, sides, [verdicts(shown, side) for side in sides])
    page.save(output / "before_after.png")
    return summary


def summarize(
    recipe: Recipe, results: dict[str, Any], seconds: float, metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    """What changed, by the reward of the evaluation, on what, how fast."""
    before, after = results["before"], results["after"]
    trained = sum(record["seconds"] for record in metrics)
    images = len(metrics) * recipe.rollout.num_prompts * recipe.rollout.group_size
    return {
        "reward_before": before["reward"],
        "reward_after": after["reward"],
        "reward_before_interval95": before["interval"],
        "reward_after_interval95": after["interval"],
        "families_before": before["families"],
        "families_after": after["families"],
        "held_out_before": before.get("held_out"),
        "held_out_after": after.get("held_out"),
        "panel_before": before["panel"],
        "panel_after": after["panel"],
        "num_prompts": after["num_prompts"],
        "num_distinct_prompts": after["num_distinct_prompts"],
        "reward": reward_of(recipe),
        "training_reward": recipe.reward,
        "seeds": {"training": recipe.seed, "evaluation": recipe.evaluation.seed},
        "output": recipe.output,
        "iterations": len(metrics),
        "seconds": seconds,
        "images_per_second": images / trained,
    }


def verdicts(prompts: Sequence[str], pictures: Sequence[Image.Image]) -> list[pages.Label]:
    """What the world's checker says of each picture: "right" or "wrong", and the dense score."""
    found = [shapes.check(p, np.asarray(i)) for p, i in zip(prompts, pictures, strict=True)]
    return [
        (f"right  {v.dense:.2f}", pages.GREEN) if v.strict else (f"wrong  {v.dense:.2f}", pages.RED)
        for v in found
    ]
