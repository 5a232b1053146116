"""`python -m tdm_r1 demo`: a tiny 4-step generator learns from a checker that no gradient reaches.

Evaluates, trains with the recipe `tiny-sd3-shapes`, evaluates again on the same held-out prompts
and noise, and writes summary.json, before_after.png and curves.png into the recipe's `output`.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tdm_r1 import shapes
from tdm_r1.config import Recipe, load_recipe

RECIPE = "tiny-sd3-shapes"
NUM_SHOWN = 24
_CELL, _LABEL = 128, 30  # pixels: one picture's side, the text under it

log = logging.getLogger(__name__)


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the demo; returns what summary.json holds. `overrides` are `a.b=value` recipe changes."""
    from tdm_r1.training.trainer import Trainer

    recipe = load_recipe(RECIPE, ["output=runs/demo", *overrides])
    start = time.perf_counter()
    for stale in Path(recipe.output).glob("checkpoint-*"):  # a demo always starts anew
        shutil.rmtree(stale)
    trainer = Trainer(recipe)
    shown = trainer.evaluator.prompts[:NUM_SHOWN]
    seed = recipe.evaluation.seed
    before = trainer.evaluator.pictures(trainer.roles["ema"], shown, seed)
    results = trainer.run()
    after = trainer.evaluator.pictures(trainer.roles["ema"], shown, seed)
    seconds = time.perf_counter() - start
    output = Path(recipe.output)
    summary = summarize(recipe, results, seconds, read_metrics(output))
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    comparison(shown, before, after).save(output / "before_after.png")
    curves(read_metrics(output), results, output / "curves.png")
    return summary


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The iterations of the last run in metrics.jsonl."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "evaluation" not in record]
    first = max(i for i, record in enumerate(records) if record["iteration"] == 1)
    return records[first:]


def summarize(
    recipe: Recipe, results: dict[str, Any], seconds: float, metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    """What changed, on what, how fast.

    Rewards are the strict score unless the recipe says otherwise.
    """
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
        "num_prompts": after["num_prompts"],
        "num_distinct_prompts": after["num_distinct_prompts"],
        "training_reward": recipe.reward,
        "seeds": {"training": recipe.seed, "evaluation": recipe.evaluation.seed},
        "output": recipe.output,
        "iterations": len(metrics),
        "seconds": seconds,
        "images_per_second": images / trained,
    }


def comparison(
    prompts: Sequence[str],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    columns: int = 4,
) -> Image.Image:
    """Left before, right after, same prompt and noise; a verdict under each, the prompt above."""
    width, height = 2 * _CELL + 16, _CELL + 2 * _LABEL
    rows = -(-len(prompts) // columns)
    page = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    for i, prompt in enumerate(prompts):
        x, y = i % columns * width + 8, i // columns * height
        draw.text((x, y + 8), prompt, fill="black", font=font)
        for j, picture in enumerate((before[i], after[i])):
            left = x + j * _CELL
            page.paste(
                picture.resize((_CELL - 4, _CELL - 4), Image.Resampling.NEAREST), (left, y + _LABEL)
            )
            verdict = shapes.check(prompt, np.asarray(picture))
            right = bool(verdict.strict)
            text = f"{'right' if right else 'wrong'}  {verdict.dense:.2f}"
            place = (left, y + _LABEL + _CELL)
            draw.text(place, text, fill=(20, 130, 60) if right else (200, 40, 30), font=font)
    return page


def curves(metrics: list[dict[str, Any]], results: dict[str, Any], file: Path) -> None:
    """Training reward per iteration, and the surrogate's margin between good and bad samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [record["iteration"] for record in metrics]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    reward = np.array([record["reward"] for record in metrics])
    left.plot(steps, reward, color="0.75", label="training reward (dense)")
    left.plot(steps, _smooth(reward), color="C0", label="smoothed")
    ends = [results["before"], results["after"]]
    for place, end in zip((0, steps[-1]), ends, strict=True):
        low, high = end["interval"]
        error = [[end["reward"] - low], [high - end["reward"]]]
        label = "held-out strict, 95 %" if place == 0 else None
        left.errorbar([place], [end["reward"]], error, fmt="o", color="C3", capsize=3, label=label)
    left.set(xlabel="iteration", ylabel="reward")
    left.legend(fontsize=8)
    right.plot(steps, _smooth(np.array([record["surrogate_margin"] for record in metrics])))
    right.set(xlabel="iteration", ylabel="surrogate margin R(G+) - R(G-)")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred moving average, narrower at the ends."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
