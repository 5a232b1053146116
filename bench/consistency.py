"""How far is a rollout from what the trainer's forward makes of its latents?

    python -m bench.consistency [--model tiny-sd3] [--output FILE]

Every latent x_k of a rollout goes through the forward that a loss differentiates, and one solver
step; the result is compared with the rollout's x_{k+1}, by the norm of the difference over that of
the step x_{k+1} - x_k, the largest over the steps. Three rollouts of one generator, an adapter on a
live base: its own module, the same with `consistent=True`, and a frozen engine into whose weights
`update_weights` has folded the adapter.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/consistency.py`, too

from bench.timing import environment, report
from tdm_r1.engine import Engine, Trajectory
from tdm_r1.models import lora
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.loading import load_transformer
from tdm_r1.models.lora_list import load_lora
from tdm_r1.training.roles import Role

PROMPTS = ["two red circles", "a green square left of a blue triangle", "the word GO on a sign"]


def generator(engine: Engine, bf16: bool) -> Role:
    """The model's few-step adapter, trainable, on its base in fp32."""
    path, file = engine.pipeline.path, engine.pipeline.lora
    base = load_transformer(path, device=engine.device, dtype=torch.float32)
    base.requires_grad_(False)
    assert file is not None
    tensors = load_lora(file, base)
    rank = next(iter(tensors.values())).a_rI.shape[0]
    lora.inject(base, ["theta"], rank=rank, alpha=rank, targets=list(tensors))
    own = lora.adapter_parameters(base, "theta")
    with torch.no_grad():
        for name, (a, b, scale) in tensors.items():
            own[f"{name}.lora_A.weight"].copy_(a)
            own[f"{name}.lora_B.weight"].copy_(b * scale)
    return Role("theta", base, "theta", bf16)


def distance(engine: Engine, role: Role, path: Trajectory, cond: Condition) -> float:
    """The largest relative distance, over the steps, of a replayed step from the rollout's."""
    worst, m = 0.0, None
    for k, t in enumerate(engine.schedule.timesteps):
        t_B = torch.full((len(path.x[k]),), t, device=engine.device)
        v = role(path.x[k], t_B, cond).detach()
        found, m = engine.schedule.step(k, path.x[k], v, m)
        step = (path.x[k + 1] - path.x[k]).norm()
        worst = max(worst, float((found - path.x[k + 1]).norm() / step))
    return worst


def measure(model: str, device: str) -> list[dict]:
    """A row for the trainer in fp32 and one for it under bf16 autocast."""
    rows = []
    for bf16 in (False, True):
        dtype = "bfloat16" if bf16 else "float32"
        engine = Engine.from_pretrained(model, device=device, dtype=dtype)
        role = generator(engine, bf16)
        engine.update_weights(role)
        side = engine.pipeline.default_size
        noise = engine.noise(list(range(len(PROMPTS))), side, side)
        cond = engine.pipeline.text.encode(PROMPTS)
        with role.active() as live:
            paths = {
                "live": engine.rollout(cond, noise, transformer=live),
                "consistent": engine.rollout(cond, noise, transformer=live, consistent=True),
            }
        paths["folded"] = engine.rollout(cond, noise)
        found = {name: distance(engine, role, path, cond) for name, path in paths.items()}
        rows.append({"trainer": "bf16 autocast" if bf16 else "fp32", "engine": dtype} | found)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and report; the last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny-sd3", help="a model with a few-step LoRA")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="store the JSON here too")
    args = parser.parse_args(argv)
    rows = measure(args.model, args.device)
    for row in rows:
        print(row)
    report(
        {"bench": "consistency", "model": args.model, **environment(), "rows": rows}, args.output
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
