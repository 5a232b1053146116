"""The gate: exported parts against the Engine's own, and whole pictures; refused if they differ.

The loop of a graph in half precision is held to the Engine's stage by stage, each from what the
exact Engine hands to it. Left to itself a loop may enlarge what two roundings differ in: of a
caption that a model is undecided about, 0.4 % of the text features can become 12 % of the latents,
or nothing, by the direction alone. One run of the Engine in half precision tells that no more than
one throw of a die does, and would be no measure of another.

Shapes: B images, T text tokens, C latent channels, h w latent size, K steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tdm_kernels.testing import ULP
from torch import Tensor

from tdm_r1.engine import Engine
from tdm_r1.errors import ExportError
from tdm_r1.export.graphs import Axes
from tdm_r1.models.conditioning import Condition
from tdm_r1.pipeline import Pipeline
from tdm_r1.text import SD3TextEncoder, ZImageTextEncoder
from tdm_r1.trajectory import Sampler

TOLERANCE = 1e-4  # fp32
# Of the shipped models' world: for other prompts they turn rounding into a hundred times as much.
PROMPTS = ("two red circles", 'a sign that says "GO"', "", "a blue square left of a green triangle")


@dataclass(frozen=True)
class Finding:
    """The largest error of one part: max |exported - engine| / max |engine| over a tensor.

    Of the stages of a loop in half precision, and of steps in fp8: the root mean square of either.
    """

    part: str
    tensor: str
    error: float
    allowed: float
    sizes: dict[str, int]

    @property
    def share(self) -> float:
        """How much of what is allowed the error takes; above 1 it is refused."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed > 0 else math.inf


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


def check(
    engine: Engine,
    exported: Engine,
    axes: Axes,
    low: Engine | None = None,
    in_mean: Sequence[str] = ("loop",),
) -> dict[str, Any]:
    """Compare every part and the whole loop at `sizes_to_try`; returns what was measured.

    Allowed is TOLERANCE, and with `low`, an Engine in half precision on the same weights, twice the
    error of that one against `engine`, plus 2 ulp; the largest of all sizes stands against the
    largest, since of one draw the errors of two roundings may well differ threefold. The loop is
    then its stages, as `_stages` has them. Errors of the parts `in_mean` are then root mean squares
    and allow no ulp. What a whole loop comes to in the end, the latents' error of both at the size
    where it is largest, is the "drift". Raises ExportError, naming the worst tensor, where an error
    is above what is allowed or not a number.
    """
    tried = sizes_to_try(axes, engine.pipeline.size_unit)
    engines = (engine, exported) if low is None else (engine, exported, low)
    errors: dict[tuple[str, str], list[list[float]]] = {}
    for seed, sizes in enumerate(tried):
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            for part, tensor, (exact, *others) in _results(engines, sizes, generator):
                mean = low is not None and part in (*in_mean, "drift")
                each = [_error(other, exact, mean) for other in others]
                errors.setdefault((part, tensor), []).append(each)
    drifts = errors.pop(("drift", "latents"), [])
    worst: dict[str, Finding] = {}
    for (part, tensor), found in errors.items():
        allowed = TOLERANCE
        if low is not None:
            ulp = 0.0 if part in in_mean else ULP[low.pipeline.transformer.dtype]
            allowed = 2 * max(each[1] for each in found) + 2 * ulp
        largest = max(range(len(found)), key=lambda i: found[i][0])
        finding = Finding(part, tensor, found[largest][0], allowed, tried[largest])
        if part not in worst or finding.share > worst[part].share:
            worst[part] = finding
    # A part that differs is the cause, the loop its consequence, however much larger.
    bad = max(
        worst.values(), key=lambda found: (found.share > 1 and found.part != "loop", found.share)
    )
    if bad.share > 1 or math.isinf(bad.error):
        where = ", ".join(f"{name} {size}" for name, size in bad.sizes.items())
        size = "largest value" if low is None or bad.part not in in_mean else "root mean square"
        raise ExportError(
            f"{bad.part} differs from the Engine: {bad.tensor} by {bad.error:.2g} of its {size} at"
            f" {where}; allowed: {bad.allowed:.2g}"
        )
    measured: dict[str, Any] = {
        "tolerance": TOLERANCE if low is None else None,
        "sizes": tried,
        "worst": {part: asdict(found) for part, found in worst.items()},
    }
    if drifts:
        measured["drift"] = dict(zip(("exported", "engine"), max(drifts), strict=True))
    return measured


def _results(
    engines: Sequence[Engine], sizes: dict[str, int], generator: torch.Generator
) -> Iterator[tuple[str, str, list[Tensor]]]:
    """(part, tensor, what each engine makes of it) at one size; the first is the model's own."""
    engine, pipelines = engines[0], [each.pipeline for each in engines]
    yield from _text_results(pipelines, sizes, generator)
    vae = engine.pipeline.vae
    height, width = (sizes[name] // vae.scale_factor for name in ("height", "width"))
    shape = (sizes["batch"], vae.latent_channels, height, width)
    x_BChw = torch.randn(shape, generator=generator)
    yield "vae_decoder", "images_B3HW", [each.vae.decode(x_BChw) for each in pipelines]
    cond = _condition(engine, sizes, generator)
    t_K1 = torch.tensor(engine.schedule.timesteps)[:, None]
    results = []
    for model in (each.transformer for each in pipelines):
        context = model.context(cond, height, width)
        table = model.modulation(context, t_K1)
        results.append((table, model(x_BChw, context, table[0]), model(x_BChw, context, table[-1])))
    names = ("context", "modulation"), ("transformer", "first step"), ("transformer", "last step")
    for (part, tensor), *outputs in zip(names, *results, strict=True):
        yield part, tensor, outputs
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(sizes["batch"])]
    drawn = [each.generate(prompts, latents=x_BChw, output_type="latent") for each in engines]
    if len(engines) > 2:
        yield "drift", "latents", drawn
        yield from (("loop", *stage) for stage in _stages(engines, prompts, x_BChw))
        return
    yield "loop", "latents", drawn
    pictures = [each.decode(latents) for each, latents in zip(engines, drawn, strict=True)]
    yield "loop", "images", pictures


def _stages(
    engines: Sequence[Engine], prompts: list[str], x_BChw: Tensor
) -> Iterator[tuple[str, list[Tensor]]]:
    """(tensor, what each engine makes of it) along the loop; all go on from the first one's."""
    conds = [each.pipeline.text.encode(prompts) for each in engines]
    yield "text features", [cond.tokens_BTE for cond in conds]
    pooled = [cond.pooled_BE for cond in conds if cond.pooled_BE is not None]
    if pooled:
        yield "pooled text", pooled
    samplers = [Sampler(each.pipeline.transformer, each.schedule) for each in engines]
    t_K1 = torch.tensor(engines[0].schedule.timesteps)[:, None]
    contexts = [each.transformer.context(conds[0], *x_BChw.shape[2:]) for each in samplers]
    tables = [
        each.transformer.modulation(context, t_K1)
        for each, context in zip(samplers, contexts, strict=True)
    ]
    x0_BChw = None
    for k in range(engines[0].schedule.num_steps):
        made = [
            sampler.step(k, x_BChw, x0_BChw, context, table[k])
            for sampler, context, table in zip(samplers, contexts, tables, strict=True)
        ]
        yield f"prediction of step {k + 1}", [prediction for _, prediction in made]
        yield f"latents after step {k + 1}", [latents for latents, _ in made]
        x_BChw, x0_BChw = made[0]
    yield "images", [each.decode(x_BChw) for each in engines]


def _text_results(
    pipelines: Sequence[Pipeline], sizes: dict[str, int], generator: torch.Generator
) -> Iterator[tuple[str, str, list[Tensor]]]:
    found = [encoders(each.text) for each in pipelines]
    for name, (own, fixed) in found[0].items():
        shape = (sizes["batch"], fixed or sizes["text"])
        ids_BT = torch.randint(own.model.config.vocab_size, shape, generator=generator)
        outputs = [each[name][0](ids_BT) for each in found]
        rows = [out if isinstance(out, tuple) else (out,) for out in outputs]
        for tensor, *results in zip(("tokens", "pooled"), *rows, strict=False):
            yield name, tensor, results


def encoders(text: Any) -> dict[str, tuple[Any, int | None]]:
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


def _error(ours: Tensor, theirs: Tensor, mean: bool = False) -> float:
    """Max |ours - theirs| / max |theirs|, infinite where either is not finite or shapes differ.

    `mean`: root mean squares in place of both maxima.
    """
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return math.inf
    size = torch.linalg.vector_norm if mean else torch.Tensor.amax
    error = size((ours.float() - theirs).abs())
    return (error / size(theirs.abs()).clamp_min(1e-30)).item()
