"""Score a shipped model and write its card.json: what made it, how long it took, how good it is.

    python -m tdm_r1.assets.card tiny-sd3 --base RUN --four-step RUN [--num-prompts 384]

RUN is a trainer's output: its recipe.yaml and metrics.jsonl give seed, iterations and seconds.
Scores are the checker's strict verdicts on captions of every family; `reward` leaves words out.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdm_r1 import rewards, shapes
from tdm_r1.assets.autoencoder import reconstruction_accuracy
from tdm_r1.config import load_recipe
from tdm_r1.engine import Engine
from tdm_r1.pipeline import ASSETS
from tdm_r1.prompts import evaluation_prompts
from tdm_r1.training.evaluate import BATCH, bootstrap_interval, by_family

FAMILIES = [family for family in shapes.FAMILIES if family != "words"]
SEED = 10_000


def verdicts(
    engine: Engine, families: list[str], num_prompts: int, guidance: float
) -> tuple[list[str], np.ndarray]:
    """Prompts of the families in turn, and the strict verdict on a picture of each."""
    zimage = engine.pipeline.family == "zimage"
    scale = None if guidance == 1.0 else guidance - 1 if zimage else guidance
    prompts = evaluation_prompts([shapes.captions(f) for f in families], num_prompts)
    pictures = []
    for start in range(0, num_prompts, BATCH):
        part = prompts[start : start + BATCH]
        pictures += engine.generate(part, seed=SEED + start, guidance_scale=scale)
    return prompts, rewards.score(rewards.load_reward("shapes:strict"), pictures, prompts)


def score(engine: Engine, num_prompts: int, guidance: float) -> dict[str, Any]:
    """Strict scores over all families but words, each family's, and words' own."""
    prompts, values = verdicts(engine, FAMILIES, num_prompts, guidance)
    # Few words: the OCR engine takes its time.
    _, words = verdicts(engine, ["words"], min(num_prompts, 64), guidance)
    return {
        "reward": float(values.mean()),
        "interval95": bootstrap_interval(values, prompts, SEED),
        "families": by_family(values, prompts) | {"words": float(words.mean())},
        "steps": engine.schedule.num_steps,
        "guidance": guidance,
        "seed": SEED,
    }


def made_by(run: Path) -> dict[str, Any]:
    """Recipe values, iterations and seconds of a training run."""
    recipe = load_recipe(run / "recipe.yaml")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line.get("seconds", 0.0) for line in lines if "evaluation" not in line)
    return {
        "method": recipe.method,
        "seed": recipe.seed,
        "iterations": recipe.iterations,
        "seconds": round(seconds),
    }


def main(argv: list[str] | None = None) -> int:
    from diffusers import AutoencoderKL

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=("tiny-sd3", "tiny-zimage"))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--four-step", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=384)
    parser.add_argument("--guidance", type=float, default=3.0, help="of the multi-step base")
    args = parser.parse_args(argv)
    autoencoder = AutoencoderKL.from_pretrained(ASSETS / args.name / "vae").float()
    runs = ((f"{args.name}-base", args.base), (f"{args.name}-tdm", args.four_step))
    base = Engine.from_pretrained(f"{args.name}-base", steps=20)
    base_in_four = Engine.from_pretrained(f"{args.name}-base")
    card = {
        "recipes": {recipe: made_by(run) for recipe, run in runs},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "scores": {
            "base": score(base, args.num_prompts, args.guidance),
            "base_at_four_steps": score(base_in_four, args.num_prompts, 1.0),
            "four_step": score(Engine.from_pretrained(args.name), args.num_prompts, 1.0),
            "autoencoder_reconstructions": reconstruction_accuracy(autoencoder, SEED),
        },
    }
    (ASSETS / args.name / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card["scores"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
