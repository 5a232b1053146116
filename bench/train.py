"""How fast is an iteration of TDM-R1 next to the same one written straightforwardly?

    python -m bench.train [--prompts 8] [--rounds 5] [--threads 2]

The opponent (`bench/train_baseline.py`) keeps its roles as PEFT adapters on diffusers' transformer
and asks for every term of every loss: 13 forwards a boundary. Both have one model, LoRA recipe,
precision, reward and number of pictures, and take turns; the same noise must give both the same
pictures first. `decode` to `optimizer` are seconds of an iteration; `backward` holds the forwards
that train.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tdm_kernels import native

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/train.py`, too

from bench.timing import environment, report
from bench.train_baseline import Baseline
from tdm_r1.config import Recipe, load_recipe
from tdm_r1.training.queries import mean_forwards
from tdm_r1.training.roles import follow
from tdm_r1.training.rollout import roll_out
from tdm_r1.training.trainer import Trainer

PHASES = ("rollout", "decode", "reward", "queries", "backward", "optimizer")
TOLERANCE = 0.05  # of |latents|: two paths in bf16, one with its residual stream in fp32


def make_recipe(model: str, prompts: int, group: int, micro_groups: int, output: str) -> Recipe:
    """The published OCR recipe in small: LoRA roles, 2 of 4 steps, the embedded world's reward."""
    values = {
        "model": model,
        "output": output,
        "roles.kind": "lora",
        "distillation.boundaries": 2,
        "optimizers.fake.name": "adamw",
        "reinforcement.judged": "trajectory",
        "reinforcement.rl_cfg": 2.5,
        "rollout.num_prompts": prompts,
        "rollout.group_size": group,
        "rollout.micro_groups": micro_groups,
    }
    return load_recipe("bench/shapes.yaml", [f"{key}={value}" for key, value in values.items()])


def check(trainer: Trainer, baseline: Baseline) -> float:
    """Both must draw the same from the same noise. Returns |difference| / |latents|.

    Raises RuntimeError.
    """
    generator, size = trainer.roles["generator"], trainer.recipe.rollout.group_size
    prompts = ["two red circles", "a blue square"]
    ours = roll_out(trainer.engine, generator, list(enumerate(prompts)), size, 0)
    _, theirs, _ = baseline.roll_out(prompts, ours.x[0])
    error = ((ours.x[-1] - theirs[-1]).norm() / theirs[-1].norm()).item()
    if error > TOLERANCE:
        raise RuntimeError(f"the baseline's latents differ by {error}")
    return error


def measure(variants: dict[str, Callable[[int], dict[str, float]]], rounds: int) -> dict:
    """Iterate in turn; returns per variant the medians of "seconds" and of every phase."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, iterate in variants.items():
            start = time.perf_counter()
            phases = iterate(round_)
            phases["seconds"] = time.perf_counter() - start
            if round_:  # the first one warms up
                samples[name].append(phases)
    return {
        name: {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}
        for name, rows in samples.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and report; the last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny-sd3-base")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=12)
    parser.add_argument("--micro-groups", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="store the JSON here too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    sizes = (arguments.prompts, arguments.group, arguments.micro_groups)
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(arguments.model, *sizes, folder)
        trainer = Trainer(recipe)
        baseline = Baseline(recipe, trainer.engine)
        error = check(trainer, baseline)

        def ours(iteration: int) -> dict[str, float]:
            metrics = trainer.method.step(iteration)
            follow(trainer.roles["ema"], trainer.roles["generator"], 1 - recipe.ema_decay)
            return {name: metrics[f"seconds_{name}"] for name in PHASES}

        def theirs(iteration: int) -> dict[str, float]:
            baseline.iterate(iteration)
            seconds = baseline.clock.read()
            return {name: seconds[f"seconds_{name}"] for name in PHASES}

        rows = measure({"ours": ours, "baseline": theirs}, arguments.rounds)
    micro_batches = arguments.prompts // arguments.micro_groups
    boundaries = micro_batches * recipe.distillation.boundaries
    asked = baseline.num_forwards - micro_batches * recipe.rollout.steps
    images = recipe.rollout.num_prompts * recipe.rollout.group_size
    for name, row in rows.items():
        row["images_per_second"] = round(images / row["seconds"], 2)
        split = "  ".join(f"{phase} {row[phase]:.2f}" for phase in PHASES)
        print(
            f"{name:9s} {row['images_per_second']:7.2f} images/s  {row['seconds']:.2f} s: {split}"
        )
    speedup = round(rows["baseline"]["seconds"] / rows["ours"]["seconds"], 2)
    print(f"{speedup}x the images per second")
    facts = {
        "model": arguments.model,
        "images": images,
        "rounds": arguments.rounds,
        "boundaries": recipe.distillation.boundaries,
        "precision": recipe.precision,
        "latent_error": error,
        "forwards_per_boundary": {
            "ours": round(mean_forwards(recipe, trainer.engine.schedule, trainer.method.shift), 2),
            "baseline": asked / boundaries,
        },
        "kernels": "reference" if native.load() else f"native {native.instruction_set()}",
    }
    report({"bench": "train", **facts, **environment(), **rows, "speedup": speedup},
           arguments.output)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
