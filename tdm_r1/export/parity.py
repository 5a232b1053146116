"""The gate: exported parts against the Engine's own, and whole pictures; refused if they differ.

Shapes: B images, T text tokens, C latent channels, h w latent size, K steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tdm_r1.engine import Engine
from tdm_r1.errors import ExportError
from tdm_r1.export.graphs import Axes
from tdm_r1.models.conditioning import Condition
from tdm_r1.text import SD3TextEncoder, ZImageTextEncoder

TOLERANCE = 1e-4  # fp32
PROMPTS = ("two red circles", 'a sign that says "open", and a blue square left of it', "", "a cat")


@dataclass(frozen=True)
class Finding:
    """The largest error of one part: max |exported - engine| / max |engine| over a tensor."""

    part: str
    tensor: str
    error: float
    sizes: dict[str, int]


def sizes_to_try(axes: Axes, unit: int) -> list[dict[str, int]]:
    """Return sizes such that every axis takes its lowest, middle and highest value.

    All axes at their lowest, then three sizes that shift one axis against the next. `unit` is what
    height and width are multiples of.
    """
    values = {}
    for name, (low, high) in axes.items():
        step = unit if name in ("height", "width") else 1
        values[name] = (low, (low + high) // 2 // step * step, high)
    shifted = [
        {name: triple[(turn + i) % 3] for i, (name, triple) in enumerate(values.items())}
        for turn in range(3)
    ]
    lowest = {name: triple[0] for name, triple in values.items()}
    return [lowest, *shifted]


def check(engine: Engine, exported: Engine, axes: Axes) -> dict[str, Any]:
    """Compare every part and the whole loop at `sizes_to_try`; returns what was measured.

    Raises ExportError, naming the worst tensor, where an error is above TOLERANCE or not a number.
    """
    tried = sizes_to_try(axes, engine.pipeline.size_unit)
    worst: dict[str, Finding] = {}
    for seed, sizes in enumerate(tried):
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            for part, tensor, ours, theirs in _pairs(engine, exported, sizes, generator):
                found = Finding(part, tensor, _error(ours, theirs), sizes)
                if part not in worst or found.error > worst[part].error:
                    worst[part] = found
    # A part that differs is the cause, the loop its consequence, however much larger.
    bad = max(worst.values(), key=lambda f: (f.error > TOLERANCE and f.part != "loop", f.error))
    if bad.error > TOLERANCE:
        where = ", ".join(f"{name} {size}" for name, size in bad.sizes.items())
        raise ExportError(
            f"{bad.part} differs from the Engine: {bad.tensor} by {bad.error:.2g} of its largest"
            f" value at {where}; allowed: {TOLERANCE:g}"
        )
    return {
        "tolerance": TOLERANCE,
        "sizes": tried,
        "worst": {part: asdict(found) for part, found in worst.items()},
    }


def _pairs(
    engine: Engine, exported: Engine, sizes: dict[str, int], generator: torch.Generator
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(part, tensor, the export's, the Engine's) at one size."""
    yield from _text_pairs(engine, exported, sizes, generator)
    vae = engine.pipeline.vae
    height, width = (sizes[name] // vae.scale_factor for name in ("height", "width"))
    shape = (sizes["batch"], vae.latent_channels, height, width)
    x_BChw = torch.randn(shape, generator=generator)
    yield (
        "vae_decoder",
        "images_B3HW",
        exported.pipeline.vae.decode(x_BChw),
        vae.decode(x_BChw),
    )
    cond = _condition(engine, sizes, generator)
    t_K1 = torch.tensor(engine.schedule.timesteps)[:, None]
    results = []
    for model in (exported.pipeline.transformer, engine.pipeline.transformer):
        context = model.context(cond, height, width)
        table = model.modulation(context, t_K1)
        results.append((table, model(x_BChw, context, table[0]), model(x_BChw, context, table[-1])))
    names = ("context", "modulation"), ("transformer", "first step"), ("transformer", "last step")
    for (part, tensor), ours, theirs in zip(names, *results, strict=True):
        yield part, tensor, ours, theirs
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(sizes["batch"])]
    ours, theirs = (each.generate(prompts, latents=x_BChw, output_type="latent")
                    for each in (exported, engine))  # fmt: skip
    yield "loop", "latents", ours, theirs
    yield "loop", "images", exported.decode(ours), engine.decode(theirs)


def _text_pairs(
    engine: Engine, exported: Engine, sizes: dict[str, int], generator: torch.Generator
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    encoders = _encoders(engine.pipeline.text), _encoders(exported.pipeline.text)
    for name, (theirs, fixed) in encoders[0].items():
        ours, _ = encoders[1][name]
        shape = (sizes["batch"], fixed or sizes["text"])
        vocabulary = theirs.model.config.vocab_size
        ids_BT = torch.randint(vocabulary, shape, generator=generator)
        outputs = (ours(ids_BT), theirs(ids_BT))
        both = [out if isinstance(out, tuple) else (out,) for out in outputs]
        for tensor, mine, reference in zip(("tokens", "pooled"), *both, strict=False):
            yield name, tensor, mine, reference


def _encoders(text: Any) -> dict[str, tuple[Any, int | None]]:
    """Name -> (ids to features, how many tokens it takes; None for any number)."""
    if isinstance(text, ZImageTextEncoder):
        return {"text_encoder": (text.features, None)}
    assert isinstance(text, SD3TextEncoder)
    found: dict[str, tuple[Any, int | None]] = {
        f"text_encoder{suffix}": (pair[1], text.clip_length)
        for suffix, pair in zip(("", "_2"), text.clips, strict=True)
    }
    return found if text.t5 is None else found | {"text_encoder_3": (text.t5[1], None)}


def _condition(engine: Engine, sizes: dict[str, int], generator: torch.Generator) -> Condition:
    """Random features as wide as the model's; of Z-Image the first caption is the longest."""
    config: Any = engine.pipeline.transformer.config
    b, num_text = sizes["batch"], sizes["text"]
    if engine.pipeline.family == "zimage":
        lengths_B = torch.randint(2, num_text + 1, (b,), generator=generator)
        lengths_B[0] = num_text
        return Condition(
            torch.randn(b, num_text, config.cap_feat_dim, generator=generator), lengths_B
        )
    text: Any = engine.pipeline.text
    total = text.clip_length + num_text
    return Condition(
        torch.randn(b, total, config.joint_attention_dim, generator=generator),
        torch.full((b,), total),
        torch.randn(b, config.pooled_projection_dim, generator=generator),
    )


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Max |ours - theirs| / max |theirs|, infinite where either is not finite or shapes differ."""
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return math.inf
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
