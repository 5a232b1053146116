"""Few-step generation: `generate` for users, `rollout` and `score` for a trainer, one trajectory.

Shapes: B images, K steps, C h w latents, H W pixels, E text width. Latents are fp32 throughout and
normalised (what the diffusion model sees); a velocity is eps - x0.
"""

from __future__ import annotations

import math
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tdm_r1 import flow
from tdm_r1.errors import ConfigError, closest
from tdm_r1.exported.loading import is_export, load_exported
from tdm_r1.exported.manifest import TENSORRT_RTX
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.layers import Transformer
from tdm_r1.pipeline import Pipeline, load_pipeline

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SOLVERS = ("auto", *flow.SOLVERS)
_DECODED_PIXELS = 24 * 512 * 512  # per VAE forward: bounds the activations of a large batch
_REMEMBERED_PLANS = 8  # SD3.5: 13 MB each
Callback = Callable[[int, float, Tensor], None]


@dataclass(frozen=True)
class Trajectory:
    """The K+1 latents x_BChw (fp32) of one run, noise first, and the schedule they follow."""

    x: tuple[Tensor, ...]
    schedule: flow.Schedule


@dataclass(frozen=True)
class _Plan:
    """All that a trajectory needs besides latents: modulation is [K, M, B or 1, 1, D]."""

    transformer: Transformer
    context: Any
    modulation: Tensor


class Engine:
    """A pipeline bound to a number of steps and a solver."""

    def __init__(self, pipeline: Pipeline, *, steps: int = 4, solver: str = "auto") -> None:
        """`solver="auto"` follows the model's stored scheduler.

        Raises ConfigError for an unknown solver, `steps` that `flow.schedule` refuses, or a
        schedule other than the one that a pipeline is tied to.
        """
        if solver not in SOLVERS:
            raise ConfigError(
                f"solver is {solver!r}; allowed: {', '.join(SOLVERS)}.{closest(solver, SOLVERS)}"
            )
        self.pipeline = pipeline
        name = pipeline.default_solver if solver == "auto" else solver
        self.schedule = flow.schedule(name, steps, pipeline.shift)
        only = pipeline.schedule
        if only is not None and only != self.schedule:
            raise ConfigError(
                f"steps is {steps} and solver is {name!r}; this export was made for"
                f" {only.num_steps} steps of {only.solver!r}"
            )
        self.decoded_pixels = _DECODED_PIXELS
        self.last_seed: int | None = None
        self._plans: OrderedDict[tuple, _Plan] = OrderedDict()
        self._t_K1 = torch.tensor(self.schedule.timesteps, device=pipeline.device)[:, None]

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        lora: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        steps: int = 4,
        solver: str = "auto",
        backend: str = "auto",
    ) -> Engine:
        """Load a shipped model, a diffusers-format directory or a Hub id; see `load_pipeline`.

        `backend="onnx"` opens a directory made by `tdm-r1-export`, and so does "auto" for one;
        `backend="tensorrt-rtx"` is refused with the reason: its engines are built, not run yet.
        """
        settings: dict[str, Any] = {"lora": lora, "device": device, "dtype": dtype}
        if backend == "auto" and is_export(name_or_dir):
            backend = "onnx"
        if backend in ("onnx", TENSORRT_RTX):
            pipeline = load_exported(name_or_dir, backend=backend, **settings)
        else:
            pipeline = load_pipeline(name_or_dir, backend=backend, **settings)
        return cls(pipeline, steps=steps, solver=solver)

    @property
    def device(self) -> torch.device:
        """Where latents and images are made."""
        return self.pipeline.device

    def generate(
        self,
        prompts: str | list[str],
        *,
        seed: int | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        callback: Callback | None = None,
        guidance_scale: float | None = None,
    ):
        """Draw images; B = len(prompts) * num_images_per_prompt, a prompt's images side by side.

        Image j of prompt i starts from the noise of seed + i * num_images_per_prompt + j, or from
        `latents` [B, C, height/8, width/8] (floating point). `seed=None` draws one and keeps it in
        `last_seed`. `callback(k, t, x_BChw)` sees the latents after every step, to read only.
        `guidance_scale` has the family's meaning in diffusers, against the empty prompt: SD3
        u + g (c - u), on above 1; Z-Image c + g (c - u), on above 0; None is off.

        Returns by `output_type`: "pil" a list of images, "np" fp32 [B,H,W,3] in [0,1], "pt" fp32
        [B,3,H,W] in [0,1], "latent" fp32 [B,C,h,w]. Raises ConfigError for a bad argument.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_choices(prompts, output_type, num_images_per_prompt)
        height, width = self._size(height, width, latents)
        count = len(prompts) * num_images_per_prompt
        if latents is None:
            x_BChw = self.noise(self._seeds(seed, count), height, width)
        else:
            x_BChw = self._check_latents(latents, count, height, width)
        weight = self._guidance_weight(guidance_scale)
        cond = self.pipeline.text.encode(prompts)
        uncond = None if weight == 1.0 else self.pipeline.text.encode([""])
        if len(prompts) > 1:  # one prompt's single row serves all its images as it is
            cond = cond.repeat(num_images_per_prompt)
        with torch.inference_mode():
            if len(prompts) == 1 and uncond is None:
                plan = self._remembered_plan(prompts[0], cond, x_BChw)
            else:
                plan = self._plan(self.pipeline.transformer, cond, uncond, x_BChw)
            x_BChw = self._trajectory(plan, x_BChw, weight, callback)
            out = x_BChw if output_type == "latent" else to_output(self.decode(x_BChw), output_type)
        # A copy made out here is an ordinary tensor, which the caller may change or differentiate.
        return out.clone() if isinstance(out, Tensor) else out

    @torch.no_grad()
    def rollout(
        self,
        cond: Condition,
        noise_BChw: Tensor,
        *,
        transformer: Transformer | None = None,
        guidance: float = 1.0,
        uncond: Condition | None = None,
    ) -> Trajectory:
        """Run the whole schedule from noise_BChw (fp32) and keep every latent.

        `cond` has B rows, or one row that serves the whole batch (a group of one prompt).
        `transformer` replaces the pipeline's own: a trainer rolls out its live module.
        `guidance` is w of v = u + w (c - u), for both families; 1 is off, anything else needs
        `uncond`. The results are ordinary tensors without a graph, fit for a later autograd pass.
        """
        if guidance != 1.0 and uncond is None:
            raise ConfigError(
                f"guidance is {guidance}, which needs `uncond`; allowed without it: 1"
            )
        if transformer is None:
            transformer = self.pipeline.transformer
        plan = self._plan(transformer, cond, None if guidance == 1.0 else uncond, noise_BChw)
        kept = [noise_BChw]
        self._trajectory(plan, noise_BChw, guidance, lambda k, t, x_BChw: kept.append(x_BChw))
        return Trajectory(tuple(kept), self.schedule)

    @torch.no_grad()
    def score(
        self, x_BChw: Tensor, t_B: Tensor, cond: Condition, transformer: Transformer | None = None
    ) -> Tensor:
        """Return v_BChw (fp32, eps - x0) at times t_B in 0..1000, without a graph."""
        if transformer is None:
            transformer = self.pipeline.transformer
        return transformer.velocity(x_BChw, t_B, cond)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Return images_B3HW, fp32 in [0, 1], for normalised latents."""
        vae = self.pipeline.vae
        pixels = latents_BChw.shape[-2] * latents_BChw.shape[-1] * vae.scale_factor**2
        parts = latents_BChw.split(max(1, self.decoded_pixels // pixels))
        images = [vae.decode(part) for part in parts]
        return images[0] if len(images) == 1 else torch.cat(images)

    def noise(self, seeds: list[int], height: int, width: int) -> Tensor:
        """Return fp32 [B, C, height/8, width/8] standard normal noise, one seed per image.

        Drawn on the CPU by a generator per image: the same seed is the same noise whatever the
        batch and the device.
        """
        vae = self.pipeline.vae
        shape = (vae.latent_channels, height // vae.scale_factor, width // vae.scale_factor)
        images = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(images).to(self.device)

    def clear_cache(self) -> None:
        """Forget what was computed for prompts: needed after a text encoder's weights change."""
        self.pipeline.text.clear_cache()
        self._plans.clear()

    def _plan(
        self, transformer: Transformer, cond: Condition, uncond: Condition | None, x_BChw: Tensor
    ) -> _Plan:
        """Compute once what depends on neither t nor x, and the modulation of every t together."""
        if uncond is not None:
            sides = [side.repeat(len(x_BChw) // len(side)) for side in (cond, uncond)]
            cond = Condition.cat(sides)
        context = transformer.context(cond, x_BChw.shape[2], x_BChw.shape[3])
        return _Plan(transformer, context, transformer.modulation(context, self._t_K1))

    def _remembered_plan(self, prompt: str, cond: Condition, x_BChw: Tensor) -> _Plan:
        """The plan of one prompt on the pipeline's transformer, until its weights change."""
        transformer = self.pipeline.transformer
        if not transformer.frozen:  # adapters may be switched, which no version counter shows
            return self._plan(transformer, cond, None, x_BChw)
        version = hash(tuple((p.data_ptr(), p._version) for p in transformer.weights))
        key = (prompt, *x_BChw.shape[2:], transformer.dtype, version)
        plan = self._plans.pop(key, None)
        if plan is None or plan.transformer is not transformer:
            plan = self._plan(transformer, cond, None, x_BChw)
        self._plans[key] = plan
        if len(self._plans) > _REMEMBERED_PLANS:
            self._plans.popitem(last=False)
        return plan

    def _trajectory(
        self, plan: _Plan, x_BChw: Tensor, weight: float, callback: Callback | None
    ) -> Tensor:
        """x_K from x_0; `weight` 1 means a plan without guidance."""
        model, x0_BChw = plan.transformer, None
        layout = {"sign": model.sign, "patch": model.config.patch_size}
        for k, t in enumerate(self.schedule.timesteps):
            if weight == 1.0:
                out_Bnf = model(x_BChw, plan.context, plan.modulation[k])
            else:
                both = model(torch.cat([x_BChw, x_BChw]), plan.context, plan.modulation[k])
                c_Bnf, u_Bnf = both.float().chunk(2)
                out_Bnf = torch.lerp(u_Bnf, c_Bnf, weight)
            step = self.schedule.constants(k)
            m_prev = x0_BChw if step["c_prev"] else None
            x_BChw, x0_BChw = model.ops.solver_step(x_BChw, out_Bnf, m_prev, **step, **layout)
            if callback is not None:
                callback(k, t, x_BChw)
        return x_BChw

    def _size(
        self, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[int, int]:
        unit, default = self.pipeline.size_unit, self.pipeline.default_size
        if isinstance(latents, Tensor) and latents.ndim == 4 and height is None and width is None:
            scale = self.pipeline.vae.scale_factor
            height, width = latents.shape[2] * scale, latents.shape[3] * scale
        height = default if height is None else height
        width = default if width is None else width
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, int) or value <= 0 or value % unit:
                raise ConfigError(f"{name} is {value!r}; allowed: a positive multiple of {unit}")
        return height, width

    def _seeds(self, seed: int | None, count: int) -> list[int]:
        if seed is None:
            seed = secrets.randbelow(2**31)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63 - count:
            raise ConfigError(
                f"seed is {seed!r}; allowed: a whole number from 0 to 2^63 - 1, or None"
            )
        self.last_seed = seed
        return list(range(seed, seed + count))

    def _check_latents(self, latents: Tensor, count: int, height: int, width: int) -> Tensor:
        vae = self.pipeline.vae
        shape = (count, vae.latent_channels, height // vae.scale_factor, width // vae.scale_factor)
        if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ConfigError(f"latents has shape {found}; this call needs {shape}")
        if not latents.is_floating_point():
            raise ConfigError(f"latents has dtype {latents.dtype}; allowed: a floating-point dtype")
        return latents.to(self.device, torch.float32)

    def _guidance_weight(self, scale: float | None) -> float:
        """w of u + w (c - u) for a family's `guidance_scale`; 1 is off."""
        if scale is None:
            return 1.0
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ConfigError(f"guidance_scale is {scale!r}; allowed: a finite number, or None")
        if self.pipeline.family == "zimage":
            return 1.0 + scale if scale > 0 else 1.0
        return float(scale) if scale > 1 else 1.0


def _check_choices(prompts: list[str], output_type: str, num_images_per_prompt: int) -> None:
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(
            f"prompts must be a string or a non-empty list of strings, got {prompts!r}"
        )
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(
            f"output_type is {output_type!r}; allowed: {', '.join(OUTPUT_TYPES)}."
            + closest(output_type, OUTPUT_TYPES)
        )
    if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
        raise ConfigError(
            f"num_images_per_prompt is {num_images_per_prompt!r}; allowed: a whole number from 1"
        )


def to_output(images_B3HW: Tensor, output_type: str):
    """Images_B3HW in [0, 1] as "pt" (unchanged), "np" fp32 [B,H,W,3] or "pil" (a list)."""
    if output_type == "pt":
        return images_B3HW
    if output_type == "np":
        return images_B3HW.permute(0, 2, 3, 1).cpu().numpy()
    pixels_BHW3 = (images_B3HW * 255).round_().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(image) for image in pixels_BHW3.contiguous().cpu().numpy()]
