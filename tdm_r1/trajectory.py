"""From noise to pictures, as calls of plain tensors that a graph can record.

Shapes: B images, K steps, M modulation vectors, D width, C h w latents, H W pixels. Latents are
fp32 and normalised (what the diffusion model sees).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tdm_r1 import flow
from tdm_r1.errors import NumericsError
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.layers import Transformer
from tdm_r1.models.zimage_layout import PAD_MULTIPLE
from tdm_r1.pipeline import Pipeline
from tdm_r1.vae import VAE, tile_side

DECODE_LIMIT = 24 * 512 * 512  # pixels per VAE forward: bounds the memory of its activations


@dataclass(frozen=True)
class Plan:
    """All that a trajectory needs besides latents: modulation is [K, M, B or 1, 1, D]."""

    transformer: Transformer
    context: Any
    modulation_KMB1D: Tensor


@dataclass(frozen=True)
class Trajectory:
    """The K+1 latents x_BChw (fp32) of one run, noise first, and the schedule they follow.

    `weights_version` is the engine's when it ran, None for a transformer that is not its own.
    """

    x: tuple[Tensor, ...]
    schedule: flow.Schedule
    weights_version: int | None = None


@dataclass(frozen=True)
class Sampler:
    """A schedule on a transformer, guided by `weight`: v = u + weight (c - u), 1 is off.

    With guidance, context and modulation hold the prompts' rows and then the empty prompt's.
    """

    transformer: Transformer
    schedule: flow.Schedule
    weight: float = 1.0

    def step(
        self,
        k: int,
        x_BChw: Tensor,
        x0_BChw: Tensor | None,
        context: Any,
        modulation_MB1D: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return (x_{k+1}, the x0 prediction of step k), given that of step k - 1."""
        model = self.transformer
        if self.weight == 1.0:
            out_Bnf = model(x_BChw, context, modulation_MB1D)
        else:
            both = model(torch.cat([x_BChw, x_BChw]), context, modulation_MB1D)
            c_Bnf, u_Bnf = both.float().chunk(2)
            out_Bnf = torch.lerp(u_Bnf, c_Bnf, self.weight)
        constants = self.schedule.constants(k)
        m_prev = x0_BChw if constants["c_prev"] else None
        layout = {"sign": model.sign, "patch": model.config.patch_size}
        return model.ops.solver_step(x_BChw, out_Bnf, m_prev, **constants, **layout)

    def states(self, x_BChw: Tensor, context: Any, modulation_KMB1D: Tensor) -> Iterator[Tensor]:
        """Yield x_1 to x_K."""
        x0_BChw = None
        for k in range(self.schedule.num_steps):
            x_BChw, x0_BChw = self.step(k, x_BChw, x0_BChw, context, modulation_KMB1D[k])
            yield x_BChw


def consistent_states(
    transformer: Transformer, schedule: flow.Schedule, x_BChw: Tensor, cond: Condition
) -> Iterator[Tensor]:
    """Yield x_1 to x_K by the forward that a loss differentiates, bit for bit: one velocity a step.

    Gradients stay on inside, since ops choose their kernels by that, and are dropped.
    """
    x0_BChw = None
    for k, t in enumerate(schedule.timesteps):
        with torch.enable_grad():
            t_B = torch.full((len(x_BChw),), t, device=x_BChw.device)
            v_BChw = transformer.velocity(x_BChw, t_B, cond)
        x_BChw, x0_BChw = schedule.step(k, x_BChw, v_BChw.detach(), x0_BChw)
        yield x_BChw


def draw_noise(vae: VAE, seeds: Sequence[int], height: int, width: int) -> Tensor:
    """Return fp32 [B, C, height/8, width/8] standard normal noise, one seed per image.

    Drawn on the CPU by a generator per image: the same seed is the same noise whatever the batch
    and the device.
    """
    shape = (vae.latent_channels, height // vae.scale_factor, width // vae.scale_factor)
    images = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(images)


def decode(vae: VAE, latents_BChw: Tensor, limit: int = DECODE_LIMIT) -> Tensor:
    """Return images_B3HW, fp32 in [0, 1], for normalised latents, `limit` pixels at a time.

    A picture of more is decoded in the largest square tiles within the limit.
    """
    each = latents_BChw.shape[-2] * latents_BChw.shape[-1] * vae.scale_factor**2
    parts = latents_BChw.split(max(1, limit // each))
    if each <= limit:
        images = [vae.decode(part) for part in parts]
    else:
        images = [vae.decode_tiled(part, tile_side(vae, limit)) for part in parts]
    return images[0] if len(images) == 1 else torch.cat(images)


def finish(
    vae: VAE, latents_BChw: Tensor, output_type: str, limit: int = DECODE_LIMIT
) -> tuple[Tensor, Tensor]:
    """Return what `output_type` asks for, and which rows of it mean something.

    "latent": the latents; "pt" and "np": images_B3HW; "pil": uint8 pixels_BHW3. The second result,
    bool [2, B], says that latents and images are finite.
    """
    finite_B = torch.isfinite(latents_BChw).flatten(1).all(1)
    if output_type == "latent":
        return latents_BChw, torch.stack([finite_B, finite_B])
    images_B3HW = decode(vae, latents_BChw, limit)
    finite_2B = torch.stack([finite_B, torch.isfinite(images_B3HW).flatten(1).all(1)])
    if output_type == "pil":
        return to_pixels(images_B3HW), finite_2B
    return images_B3HW, finite_2B


def to_pixels(images_B3HW: Tensor) -> Tensor:
    """Return uint8 [B, H, W, 3], contiguous, for images in [0, 1]."""
    return (images_B3HW * 255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def hand_over(out: Tensor, output_type: str) -> Any:
    """Return what `finish` made as a caller takes it."""
    if output_type == "pil":
        return [Image.fromarray(pixels_HW3) for pixels_HW3 in out.cpu().numpy()]
    if output_type == "np":
        return out.permute(0, 2, 3, 1).cpu().numpy()
    # A copy made outside of inference mode is an ordinary tensor, which the caller may change.
    return out.clone() if out.is_inference() else out


def to_output(images_B3HW: Tensor, output_type: str) -> Any:
    """Images_B3HW in [0, 1] as "pt" (unchanged), "np" fp32 [B,H,W,3] or "pil" (a list)."""
    return hand_over(to_pixels(images_B3HW) if output_type == "pil" else images_B3HW, output_type)


def check_finite(
    finite_FB: Tensor,
    pipeline: Pipeline,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> None:
    """Raise NumericsError for rows that are not finite: latents (first row of F), then images.

    It names the first one's prompt and seed where they are known, and counts the others.
    """
    if bool(finite_FB.all()):
        return
    rows = [row for row, good in enumerate(finite_FB.all(0).tolist()) if not good]
    what = "picture" if bool(finite_FB[0, rows[0]]) else "latents"
    which = f"row {rows[0]} of {finite_FB.shape[1]}"
    if prompts is not None:
        noise = "the given latents" if seeds is None else f"seed {seeds[rows[0]]}"
        which = f"prompt {prompts[rows[0]]!r} with {noise} ({which})"
    others = f", and those of {len(rows) - 1} more," if len(rows) > 1 else ""
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    raise NumericsError(
        f"the {what} of {which}{others} hold NaN or infinities: {pipeline.name} overflows in"
        f" {dtype}, or its weights are broken",
        rows,
    )


def example_conditions(
    pipeline: Pipeline, num_prompts: int, lengths: Sequence[int] | None
) -> Iterator[Condition]:
    """Yield empty text of every shape that `num_prompts` prompts of these lengths can take.

    Lengths in tokens; None is every one: SD3 pads to one, Z-Image to the multiples of 32, and there
    prompts that pad to different lengths make one shape more.
    """
    text: Any = pipeline.text
    like, zimage = text.encode([""]), pipeline.family == "zimage"
    if lengths is None and zimage:
        frames = pipeline.transformer.config.axes_lens[0] - 2
        longest = min(text.max_length, frames // PAD_MULTIPLE * PAD_MULTIPLE)
        if pipeline.text_axis is not None:
            longest = min(longest, pipeline.text_axis[1])
        ends = range(PAD_MULTIPLE, longest + PAD_MULTIPLE, PAD_MULTIPLE)
        lengths = [min(length, longest) for length in ends]
    elif lengths is None:
        lengths = [like.tokens_BTE.shape[1]]
    for length in lengths:
        tokens = like.tokens_BTE.new_zeros(num_prompts, length, like.tokens_BTE.shape[2])
        pooled = None if like.pooled_BE is None else like.pooled_BE.expand(num_prompts, -1)
        counts = torch.full((num_prompts,), length, device=tokens.device)
        yield Condition(tokens, counts, pooled)
        if zimage and num_prompts > 1 and length > PAD_MULTIPLE:
            counts = counts.clone()
            counts[1:] = PAD_MULTIPLE
            yield Condition(tokens, counts, pooled)
