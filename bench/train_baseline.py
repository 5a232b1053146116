"""One TDM-R1 iteration as it is written down: PEFT adapters on diffusers' SD3, eager, bf16.

The opponent of `bench.train`. Every term of every loss asks the models for what it reads: 13
forwards per boundary. Shapes: B rows (a micro-batch of whole groups), G samples of a group, C h w
latents, K steps.
"""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from tdm_r1 import rewards
from tdm_r1.config import Recipe
from tdm_r1.engine import Engine
from tdm_r1.models.lora import TARGETS
from tdm_r1.prompts import PromptSampler, load_prompts
from tdm_r1.training.clock import Clock

ADAPTERS = ("generator", "fake", "surrogate", "lag", "ema")
TRAINED = ("generator", "fake", "surrogate")


class Baseline:
    """Models, optimizers and prompts of a recipe with LoRA roles and a frozen reference."""

    def __init__(self, recipe: Recipe, engine: Engine) -> None:
        """`engine`: whose weights, sigmas and picture size to use."""
        self.recipe, self.clock = recipe, Clock()
        pipeline = engine.pipeline
        self.pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(pipeline.path)
        self.pipe.set_progress_bar_config(disable=True)
        self.vae, self.model = self.pipe.vae, self.pipe.transformer
        self.t5_length = pipeline.text.t5_length
        self.side = pipeline.default_size // pipeline.vae.scale_factor
        self.sigmas, self.shift = engine.schedule.sigmas, pipeline.shift
        for module in (self.vae, self.model):
            module.requires_grad_(False)
        roles = recipe.roles
        config = LoraConfig(
            r=roles.rank,
            lora_alpha=roles.alpha,
            init_lora_weights="gaussian",
            target_modules=list(roles.targets or TARGETS["sd3"]),
        )
        for name in ADAPTERS:
            self.model.add_adapter(config, name)
        self.tensors = {
            name: [p for key, p in self.model.named_parameters() if f".{name}." in key]
            for name in ADAPTERS
        }
        for copy, origin in (("lag", "surrogate"), ("ema", "generator")):
            self._lerp(copy, origin, 1.0)
        self.optimizers = {}
        for name in TRAINED:
            o = getattr(recipe.optimizers, name)
            self.optimizers[name] = torch.optim.AdamW(
                self.tensors[name], o.lr, o.betas, o.eps, o.weight_decay
            )
        self.sampler = PromptSampler(
            load_prompts(recipe.prompts.source, recipe.prompts.families, recipe.prompts.split),
            recipe.seed,
        )
        self.reward = rewards.load_reward(recipe.reward)
        self.num_forwards = 0  # of the models, in the last iteration

    def iterate(self, iteration: int) -> None:
        """Section by section: rollout, decode, reward, losses of 2 of 4 steps, one step each."""
        recipe, rollout = self.recipe, self.recipe.rollout
        self.num_forwards = 0
        prompts = [prompt for _, prompt in self.sampler.draw(rollout.num_prompts)]
        count = rollout.micro_groups
        with self.clock.phase("rollout"):
            uncond = self.encode([""])
            batches = [self.roll_out(prompts[i : i + count]) for i in range(0, len(prompts), count)]
        values = []
        for names, path, _ in batches:
            with self.clock.phase("decode"):
                pictures = self.decode(path[-1])
            with self.clock.phase("reward"):
                values.append(rewards.score(self.reward, pictures, names))
        reward_PG = torch.from_numpy(np.stack(values)).view(-1, rollout.group_size)
        advantage_PG = reward_PG - reward_PG.mean(1, keepdim=True)
        advantage_PG = (advantage_PG / (reward_PG.std() + 1e-4)).clamp(-5, 5).float()
        num_steps, passes = rollout.steps, len(batches) * recipe.distillation.boundaries
        weights = np.arange(1, num_steps + 1) / (num_steps * (num_steps + 1) / 2)
        for (names, path, cond), advantage in zip(
            batches, advantage_PG.reshape(len(batches), -1), strict=True
        ):
            nothing = [tensor.expand(len(names), *tensor.shape[1:]) for tensor in uncond]
            for k in np.random.permutation(num_steps)[: recipe.distillation.boundaries]:
                j = np.random.choice(num_steps, p=weights)
                self._fake(path, int(k), cond, passes)
                self._surrogate(path, int(j), cond, advantage, passes)
                self._generator(path, int(k), cond, nothing, passes)
        with self.clock.phase("optimizer"):
            for name, optimizer in self.optimizers.items():
                clip = getattr(recipe.optimizers, name).clip
                torch.nn.utils.clip_grad_norm_(self.tensors[name], clip)
                optimizer.step()
                optimizer.zero_grad()
            self._lerp("ema", "generator", 1 - recipe.ema_decay)
            self._lerp("lag", "surrogate", 1 - min(0.3, 0.001 + 0.001 * iteration))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token and pooled features."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False,
            max_sequence_length=self.t5_length,
        )  # fmt: skip
        return tokens, pooled

    def roll_out(
        self, prompts: list[str], noise_BChw: Tensor | None = None
    ) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """(prompt of every row, K+1 latents, condition of every row), by the generator."""
        size = self.recipe.rollout.group_size
        names = [prompt for prompt in prompts for _ in range(size)]
        cond = [tensor.repeat_interleave(size, 0) for tensor in self.encode(prompts)]
        shape = (len(names), self.model.config.in_channels, self.side, self.side)
        x = torch.randn(shape) if noise_BChw is None else noise_BChw
        path = [x]
        for k, (s, following) in enumerate(zip(self.sigmas, self.sigmas[1:], strict=False)):
            v = self.ask("generator", x, torch.full((len(x),), s), cond)
            x = path[k] - (s - following) * v
            path.append(x)
        return names, path, cond

    @torch.no_grad()
    def decode(self, x_BChw: Tensor) -> list[Image.Image]:
        """Pictures of final latents."""
        config = self.vae.config
        with torch.autocast("cpu", torch.bfloat16):
            z = x_BChw / config.scaling_factor + config.shift_factor
            images = self.vae.decode(z, return_dict=False)[0]
        return self.pipe.image_processor.postprocess(images.float(), output_type="pil")

    def velocity(self, adapter: str, x: Tensor, s_B: Tensor, cond) -> Tensor:
        """v of one adapter ("base": of none) at levels s."""
        self.num_forwards += 1
        if adapter == "base":
            self.model.disable_adapters()
        else:
            self.model.enable_adapters()
            self.model.set_adapter(adapter)
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(
                hidden_states=x, timestep=s_B * 1000, encoder_hidden_states=cond[0],
                pooled_projections=cond[1], return_dict=False,
            )[0].float()  # fmt: skip

    @torch.no_grad()
    def ask(self, adapter: str, x: Tensor, s_B: Tensor, cond) -> Tensor:
        """`velocity` without a graph."""
        return self.velocity(adapter, x, s_B, cond)

    def _query(self, adapter: str, x: Tensor, s_B: Tensor, cond) -> Tensor:
        """The x0 prediction."""
        with self.clock.phase("queries"):
            return x - _col(s_B) * self.ask(adapter, x, s_B, cond)

    def _renoised(self, path: list[Tensor], boundary: int, lower: float, *, group: bool):
        """x_s, s, eps above `lower`; one s and eps per group, or per sample."""
        x_b, s_b = path[boundary], self.sigmas[boundary]
        size = self.recipe.rollout.group_size if group else 1
        floor = lower / (self.shift - (self.shift - 1) * lower) + 0.02
        u = floor + (1 - floor) * torch.rand(len(x_b) // size)
        s = (self.shift * u / (1 + (self.shift - 1) * u)).repeat_interleave(size)
        eps = torch.randn(len(x_b) // size, *x_b.shape[1:]).repeat_interleave(size, 0)
        a = (1 - s) / (1 - s_b)
        b = (s**2 - (s_b * a) ** 2).sqrt()
        return _col(a) * x_b + _col(b) * eps, s, eps

    def _descend(self, loss: Tensor, passes: int) -> None:
        (loss / passes).backward()

    def _fake(self, path: list[Tensor], k: int, cond, passes: int) -> None:
        sigma, x_k = self.sigmas[k], path[k]
        x0_hat = self._query("generator", x_k, torch.full((len(x_k),), sigma), cond)
        x_s, s, _ = self._renoised(path, k + 1, self.sigmas[k + 1], group=False)
        with self.clock.phase("queries"):
            v_base = self.ask("base", x_s, s, cond)
        with self.clock.phase("backward"):
            v = self.velocity("fake", x_s, s, cond)
            loss = (v - (x_s - x0_hat) / _col(s)).square().mean()
            drift = (v - v_base).square().mean()
            self._descend(loss + self.recipe.distillation.base_drift * drift, passes)

    def _surrogate(self, path: list[Tensor], j: int, cond, a_B: Tensor, passes: int) -> None:
        rl, s_b, x_b = self.recipe.reinforcement, self.sigmas[j + 1], path[j + 1]
        x_s, s, eps = self._renoised(path, j + 1, max(s_b, rl.t_min_reward), group=True)
        with self.clock.phase("queries"):
            v_base, v_lag = self.ask("base", x_s, s, cond), self.ask("lag", x_s, s, cond)
        a = (1 - s) / (1 - s_b)
        b = (s**2 - (s_b * a) ** 2).sqrt()
        v_star = -x_b / (1 - s_b) + eps * _col((s + s_b**2 * a) / b)
        with self.clock.phase("backward"):
            v = self.velocity("surrogate", x_s, s, cond)
            d, d_ref, d_lag = (_mean((x - v_star).square()) for x in (v, v_base, v_lag))
            size = self.recipe.rollout.group_size
            logit = (a_B * (d.detach() - d_ref)).view(-1, size).mean(1) * rl.beta
            weight = logit.sigmoid().repeat_interleave(size)
            ratio = (d_lag - d.detach()).exp()
            stop = (a_B > 0) & (ratio > 1 + rl.lag_clip) | (a_B < 0) & (ratio < 1 - rl.lag_clip)
            drift = (v - v_base).square().mean()
            if drift > rl.drift_gate:
                better = d.detach() < d_ref
                stop = stop | (a_B > 0) & better | (a_B < 0) & ~better
            kept = torch.where(stop, d.detach(), d)
            loss = (weight * a_B * kept).mean() + rl.drift_weight * drift
            self._descend((j + 1) / self.recipe.rollout.steps * loss, passes)

    def _generator(self, path: list[Tensor], k: int, cond, uncond, passes: int) -> None:
        rl, distil, x_k = self.recipe.reinforcement, self.recipe.distillation, path[k]
        x_s, s, _ = self._renoised(path, k + 1, self.sigmas[k + 1], group=False)
        base_c, base_u = (self._query("base", x_s, s, c) for c in (cond, uncond))
        kl = base_c - self._query("fake", x_s, s, cond)
        cfg = distil.cfg * (base_c - base_u)
        teacher = base_u + distil.weight_cfg * (base_c - base_u)
        pulled = k < rl.trunc_steps
        if pulled:
            floor = max(self.sigmas[k + 1], rl.t_min)
            x_r, r, _ = self._renoised(path, k + 1, floor, group=True)
            base_r = self._query("base", x_r, r, cond)
            sur_c, sur_u = (self._query("surrogate", x_r, r, c) for c in (cond, uncond))
            guided = sur_u + rl.rl_cfg * (sur_c - sur_u)
        with self.clock.phase("backward"):
            s_k = torch.full((len(x_k),), self.sigmas[k])
            x0_hat = x_k - self.sigmas[k] * self.velocity("generator", x_k, s_k, cond)
            w = _mean((x0_hat.detach() - teacher).abs()).clamp(min=1e-3)
            guidance, divergence = (_square(x0_hat, direction) for direction in (cfg, kl))
            if pulled:
                w_r = _mean((x0_hat.detach() - guided).abs()).clamp(min=1e-3)
                reward = _square(x0_hat, guided - base_r) / w_r
                loss = (rl.tdm_weight * guidance + divergence) / w + rl.rl_weight * reward
            else:
                loss = rl.tdm_weight * (guidance + divergence) / w
            self._descend(loss.mean(), passes)

    @torch.no_grad()
    def _lerp(self, copy: str, origin: str, rate: float) -> None:
        for tensor, source in zip(self.tensors[copy], self.tensors[origin], strict=True):
            tensor.lerp_(source, rate)


def _col(s_B: Tensor) -> Tensor:
    return s_B.view(-1, 1, 1, 1)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _square(x0_hat: Tensor, direction: Tensor) -> Tensor:
    """mean (sg(x0_hat + D) - x0_hat)^2 of every row."""
    return _mean(((x0_hat.detach() + direction) - x0_hat).square())
