"""What `Engine.generate` is asked for, checked: every refusal names the argument and what may be.

Shapes: B images, C h w latents.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tdm_r1 import flow
from tdm_r1.errors import ConfigError, closest
from tdm_r1.pipeline import Pipeline
from tdm_r1.vae import TILE_UNIT

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SOLVERS = ("auto", *flow.SOLVERS)


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, of Python's or NumPy's kind."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_solver(solver: str) -> None:
    """Raise ConfigError unless `solver` is one of SOLVERS."""
    if solver not in SOLVERS:
        raise ConfigError(
            f"solver is {solver!r}; allowed: {', '.join(SOLVERS)}.{closest(solver, SOLVERS)}"
        )


def check_choices(
    prompts: str | Sequence[str],
    output_type: str,
    num_images_per_prompt: int,
    callback: Any = None,
) -> list[str]:
    """Return the prompts; raise ConfigError for arguments that no call can serve."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ConfigError(f"prompts must be a string or a non-empty list of them, got {prompts!r}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ConfigError(f"prompts must be strings, got {prompt!r}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"prompt {prompt!r} is no Unicode text: {error.reason}") from error
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(
            f"output_type is {output_type!r}; allowed: {', '.join(OUTPUT_TYPES)}."
            + closest(output_type, OUTPUT_TYPES)
        )
    if not is_whole(num_images_per_prompt) or num_images_per_prompt < 1:
        raise ConfigError(
            f"num_images_per_prompt is {num_images_per_prompt!r}; allowed: a whole number from 1"
        )
    if callback is not None and not callable(callback):
        raise ConfigError(f"callback is {callback!r}; allowed: a function of (k, t, latents)")
    return list(prompts)


def picture_size(
    pipeline: Pipeline, height: int | None, width: int | None, latents: Tensor | None = None
) -> tuple[int, int]:
    """Return height and width in pixels: as asked, else the latents', else the model's own."""
    unit, default = pipeline.size_unit, pipeline.default_size
    if isinstance(latents, Tensor) and latents.ndim == 4 and height is None and width is None:
        scale = pipeline.vae.scale_factor
        height, width = latents.shape[2] * scale, latents.shape[3] * scale
    height = default if height is None else height
    width = default if width is None else width
    for name, value in (("height", height), ("width", width)):
        if not is_whole(value) or value <= 0 or value % unit:
            raise ConfigError(f"{name} is {value!r}; allowed: a positive multiple of {unit}")
    return int(height), int(width)


def check_decode_limit(pipeline: Pipeline, limit: int) -> None:
    """Raise ConfigError for a `decode_limit` that does not hold one tile."""
    least = (TILE_UNIT * pipeline.vae.scale_factor) ** 2
    if not is_whole(limit) or limit < least:
        raise ConfigError(
            f"decode_limit is {limit!r}; allowed: a whole number of pixels from {least}"
        )


def picture_seeds(seed: int | None, count: int) -> list[int]:
    """Return the seed of each of `count` pictures, from `seed` on; None draws the first."""
    if seed is None:
        seed = secrets.randbelow(2**31)
    if not is_whole(seed) or not 0 <= seed < 2**63 - count:
        raise ConfigError(f"seed is {seed!r}; allowed: a whole number from 0 to 2^63 - 1, or None")
    return list(range(int(seed), int(seed) + count))


def given_latents(
    pipeline: Pipeline, latents: Tensor, count: int, height: int, width: int
) -> Tensor:
    """Return the latents a caller starts from as fp32 on the pipeline's device."""
    vae = pipeline.vae
    shape = (count, vae.latent_channels, height // vae.scale_factor, width // vae.scale_factor)
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
        found = "a " + type(latents).__name__
        if isinstance(latents, Tensor):
            found = f"a tensor of {tuple(latents.shape)}"
        raise ConfigError(f"latents is {found}; this call needs a tensor of {shape}")
    if not latents.is_floating_point():
        raise ConfigError(f"latents has dtype {latents.dtype}; allowed: a floating-point dtype")
    return latents.to(pipeline.device, torch.float32)


def guidance_weight(family: str, scale: float | None) -> float:
    """Return w of u + w (c - u) for a family's `guidance_scale`; 1 is off."""
    if scale is None:
        return 1.0
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ConfigError(f"guidance_scale is {scale!r}; allowed: a finite number, or None")
    if family == "zimage":
        return 1.0 + scale if scale > 0 else 1.0
    return float(scale) if scale > 1 else 1.0
