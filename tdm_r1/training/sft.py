"""`method: sft`: supervised flow matching of a multi-step base model on captioned pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tdm_r1 import flow
from tdm_r1.errors import ConfigError
from tdm_r1.training import distributed
from tdm_r1.training.data import load_data
from tdm_r1.training.losses import flow_matching_loss

if TYPE_CHECKING:
    from tdm_r1.training.trainer import Trainer


class Sft:
    """One optimizer step per iteration on `data.batch_size` pairs, split over the ranks.

    sigma = shift(sigmoid(n)), n ~ N(0, 1): logit-normal noise levels (SD3, arXiv 2403.03206).
    """

    accumulation = {"generator": 1}

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        recipe = trainer.recipe
        size = recipe.data.batch_size
        if size % distributed.world_size():
            raise ConfigError(f"data.batch_size = {size} does not divide over the ranks")
        self.data = load_data(recipe.data, trainer.pipeline, recipe.seed)
        if recipe.compile:
            trainer.roles["generator"].transformer.compile()
        self.shift = recipe.sigma_shift or trainer.pipeline.shift

    def step(self, iteration: int) -> dict[str, float]:
        """Draw, predict, regress. Returns the loss of this rank's share."""
        recipe = self.trainer.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + iteration)
        size = recipe.data.batch_size
        x0, cond = self.data.batch(size, recipe.data.caption_dropout, generator)
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        n_B = torch.randn(size, generator=generator).to(x0.device)
        share = size // distributed.world_size()
        mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        x0, eps, s_B = x0[mine], eps[mine], flow.shift_sigma(n_B.sigmoid(), self.shift)[mine]
        x_s = (1 - s_B[:, None, None, None]) * x0 + s_B[:, None, None, None] * eps
        engine = self.trainer.engines["generator"]
        v = engine(x_s, s_B * 1000, cond.rows(mine))
        loss, metrics = flow_matching_loss(v, x0, eps)
        self.trainer.descent.backward("generator", loss)
        self.trainer.descent.step()
        return {name: float(value) for name, value in metrics.items()}
