"""How much of the surrogate's first gradient is signal, by noise level?

    python -m bench.gradient_signal [--recipe bench/shapes.yaml] [--prompts 384] [--output FILE]

Two disjoint sets of rollouts give two gradients of the surrogate's loss, with levels from one range
alone. Each is signal plus noise of its own sample, so their cosine is c = S / (S + N/n): the share
of signal in a gradient of n pictures. n (1 - c) / c pictures would make it one half. Final pictures
are judged; both gates are open.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/gradient_signal.py`, too

from bench.timing import environment, report
from tdm_r1 import flow
from tdm_r1.config import load_recipe
from tdm_r1.training.losses import surrogate_loss
from tdm_r1.training.rollout import Batch, keyed_generator, roll_out, score_batches
from tdm_r1.training.tdm import SURROGATE
from tdm_r1.training.trainer import Trainer

EDGES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.96, 1.0)  # levels, from a recipe's t_min up to noise


def judged(trainer: Trainer, num_prompts: int) -> list[Batch]:
    """Rollouts of the generator with their advantages, over all of them; whole micro-batches."""
    method, recipe, role = trainer.method, trainer.recipe, trainer.roles["generator"]
    groups, count = method.sampler.draw(num_prompts), recipe.rollout.micro_groups
    parts = [groups[i : i + count] for i in range(0, num_prompts - count + 1, count)]
    size, seed = recipe.rollout.group_size, recipe.seed
    batches = [roll_out(trainer.engine, role, part, size, seed) for part in parts]
    score_batches(trainer.engine, role, batches, method.reward, method.clock)
    return batches


def gradient(trainer: Trainer, batches: Sequence[Batch], lower: float, upper: float) -> Tensor:
    """The surrogate's gradient, [N] fp64, at levels uniform in [lower, upper], one per group."""
    role, rl = trainer.roles["surrogate"], trainer.recipe.reinforcement
    parameters = list(role.tensors().values())
    total = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    for batch in batches:
        assert batch.advantage_B is not None
        key = (trainer.recipe.seed, 0, SURROGATE)
        draws = [keyed_generator(*key, group) for group in batch.group_ids]
        x_BChw, size = batch.x[-1], batch.group_size
        s_P = torch.cat([lower + (upper - lower) * torch.rand(1, generator=g) for g in draws])
        eps_PChw = torch.stack([torch.randn(x_BChw.shape[1:], generator=g) for g in draws])
        s_B, eps_BChw = (x.repeat_interleave(size, 0).to(x_BChw) for x in (s_P, eps_PChw))
        x_s = flow.renoise(x_BChw, 0.0, s_B, eps_BChw)
        v_star = flow.renoise_velocity(x_BChw, 0.0, s_B, eps_BChw)
        v = role(x_s, s_B * 1000, batch.cond)
        loss, _ = surrogate_loss(
            v, v_star, v.detach(), v.detach(), None, batch.advantage_B,
            num_groups=batch.num_groups, j=0, num_steps=1, beta=rl.beta, lag_clip=None,
        )  # fmt: skip
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for sum_, part in zip(total, found, strict=True):
            if part is not None:
                sum_ += part
    return torch.cat([sum_.flatten() for sum_ in total]) / len(batches)


def compare(first: Tensor, second: Tensor, pictures: int) -> dict[str, float | None]:
    """Cosine and mean norm of two gradients, and the pictures that a gradient half signal takes.

    None where the cosine is not positive: no signal was found.
    """
    cosine = float(first @ second / (first.norm() * second.norm()))
    return {
        "cosine": round(cosine, 3),
        "norm": round(float(first.norm() + second.norm()) / 2, 4),
        "pictures_for_half": round(pictures * (1 - cosine) / cosine) if cosine > 0 else None,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and report; the last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="bench/shapes.yaml")
    parser.add_argument("--prompts", type=int, default=384, help="of both sets together")
    parser.add_argument("--set", action="append", default=[], help="a key of the recipe: a.b=value")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="store the JSON here too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load_recipe(arguments.recipe, [*arguments.set, f"output={folder}"]))
        batches = judged(trainer, arguments.prompts)
        middle = len(batches) // 2
        halves = batches[:middle], batches[middle : 2 * middle]
        pictures = sum(len(batch.x[0]) for batch in halves[0])
        rows = []
        for lower, upper in zip(EDGES, EDGES[1:], strict=False):
            first, second = (gradient(trainer, half, lower, upper) for half in halves)
            rows.append({"lower": lower, "upper": upper, **compare(first, second, pictures)})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    facts = {"recipe": arguments.recipe, "changed": arguments.set, "pictures": pictures}
    report({"bench": "gradient_signal", **facts, **environment(), "rows": rows}, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
