"""What the training tests share: recipes over random tiny models, and conditions."""

from __future__ import annotations

import torch
import yaml

from tdm_r1.config import load_recipe
from tdm_r1.models.conditioning import Condition

BRIGHT = """import numpy as np
def score(images, prompts):
    return [float(np.asarray(i).mean()) / 255 for i in images]
"""


def condition(family: str, num: int) -> Condition:
    """A random condition of the widths in tests/tiny.py."""
    generator = torch.Generator().manual_seed(7)
    if family == "sd3":
        tokens, pooled = (
            torch.randn(num, 40, 64, generator=generator),
            torch.randn(num, 56, generator=generator),
        )
        return Condition(tokens, torch.full((num,), 40), pooled)
    return Condition(torch.randn(num, 9, 48, generator=generator), torch.full((num,), 9), None)


def bright_reward(folder) -> str:
    """Write a reward, the mean brightness of a picture, into `folder`; returns its name."""
    path = folder / "bright.py"
    path.write_text(BRIGHT)
    return f"{path}:score"


def write_recipe(folder, model, **values):
    """A recipe file of two small iterations over `model`."""
    recipe = {
        "model": str(model),
        "method": "tdm_r1",
        "reward": "shapes",
        "iterations": 2,
        "output": str(folder / "run"),
        "precision": "fp32",
        "prompts": {"families": ["counting", "two"]},
        "rollout": {"num_prompts": 2, "group_size": 3, "micro_groups": 1},
        "roles": {"kind": "lora", "rank": 4, "alpha": 4.0},
        "evaluation": {"families": ["counting"], "num_prompts": 4},
        "data": {"num_pictures": 32, "batch_size": 8},
    }
    recipe.update(values)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def recipe(folder, model, **values):
    """The same, loaded."""
    return load_recipe(write_recipe(folder, model, **values))


def hashes(trainer):
    """The hash of every role's weights."""
    return {name: role.sha256() for name, role in trainer.roles.items()}
