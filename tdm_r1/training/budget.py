"""What a run takes, by arithmetic: parameters, bytes per phase of an iteration, forwards.

The formulas (N GPUs, bytes, T tokens of a row, D wide):

    weights      base: parameters and buffers in `memory.base`; a role of its own, or an adapter: 4
                 per parameter, for trained roles and for their copies (EMA, lag, reference); ZeRO-3
                 keeps 1/N of these
    gathered     under ZeRO-3, 4 per parameter of a role while it works: the generator all through
                 the rollouts, the EMA while evaluating, one role while training; among the queries
                 two, for the surrogate stays while its copies are asked
    gradients    4 per trained parameter; ZeRO-2 and 3 keep 1/N of them and a 2 GB bucket
    optimizer    8 per trained parameter (AdamW); under ZeRO 8 + 4, and 1/N of that
    kept         per row of a micro-step, token and block, for the backward pass:
                     D (S a_r + W a), or with checkpoint_blocks D (a_r + (S - 1) a)
                 S = 2 streams (a residual, what reads it), 3 for image rows of a block that attends
                 twice; a_r, a: bytes of a residual and of an activation; W: `WIDE`, counted on the
                 graph of one block. One role's graph lives at a time.
    recomputed   with checkpoint_blocks, one block's D (S a_r + W a) on top
    cast weights 2 per parameter where a role has its own and autocast is on, which keeps copies
    working      without gradients: 12 D numbers of 4 bytes per row and token, of one block; in the
                 VAE, per picture at full resolution, the widest map four times, three of them fp32
                 where autocast is on (GroupNorm)

Latents of every step and the texts stay for a whole iteration. Attention is never materialised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tdm_r1 import flow
from tdm_r1.config import Recipe
from tdm_r1.training import queries
from tdm_r1.training.evaluate import BATCH as EVALUATED
from tdm_r1.training.roles import COPIES, ORIGIN, TRAINED
from tdm_r1.training.sizes import Size
from tdm_r1.trajectory import DECODE_LIMIT

_BUCKET = 2e9
_QUERY_WIDTH = 12
# (family, attends twice) -> activation kind and precision -> D-wide activations of one block that
# the graph of a LoRA, or of all parameters, keeps.
WIDE = {
    ("sd3", False): {"lora": {"bf16": 19.1, "fp32": 15.1}, "full": {"bf16": 23.1, "fp32": 19.0}},
    ("sd3", True): {"lora": {"bf16": 31.2, "fp32": 23.1}, "full": {"bf16": 36.1, "fp32": 27.1}},
    ("zimage", False): {"lora": {"bf16": 20.4, "fp32": 14.4}, "full": {"bf16": 23.1, "fp32": 18.0}},
}
_DETECTOR = 69_000_000  # parameters of GenEval's default, Mask2Former on Swin-S
_CLIP = 428_000_000  # of CLIP ViT-L/14


@dataclass(frozen=True)
class Phase:
    """Bytes that are on one GPU at the same time, by what they are."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


def role_parameters(recipe: Recipe, size: Size) -> dict[str, int]:
    """Parameters that each role has to itself."""
    names: Sequence[str] = (*TRAINED[recipe.method], *COPIES[recipe.method])
    if recipe.reinforcement.reference == "ema":
        names = (*names, "reference")
    config = recipe.roles
    found = {}
    for name in names:
        own = config.kind == "full" or ORIGIN.get(name, name) in config.full
        found[name] = (
            size.parameters if own else size.adapter_parameters(config.rank, config.targets)
        )
    return found


def forwards_per_picture(recipe: Recipe, size: Size) -> dict[str, float]:
    """Rows that pass the transformer for one picture of an iteration, by purpose: a mean.

    "backward" counts rows whose gradient is taken; recomputed blocks are not counted.
    """
    if recipe.method == "sft":
        return {"trained": 1.0, "backward": 1.0}
    rollout, distillation = recipe.rollout, recipe.distillation
    solver = size.solver if rollout.solver == "auto" else rollout.solver
    schedule = flow.schedule(solver, rollout.steps, size.shift)
    shift = recipe.sigma_shift or size.shift
    trained, extra = len(TRAINED[recipe.method]), distillation.fake_updates - 1
    per_boundary = {
        "queries": queries.mean_forwards(recipe, schedule, shift) - trained + extra,
        "trained": float(trained + extra),
    }
    found = {name: rows * distillation.boundaries for name, rows in per_boundary.items()}
    return {"rollout": float(rollout.steps), **found, "backward": found["trained"]}


def phases(
    recipe: Recipe, size: Size, roles: dict[str, int], gpus: int, side: int
) -> tuple[Phase, ...]:
    """What is on one GPU in each phase of a run; evaluation is rank 0's alone."""
    memory, rows = recipe.memory, rows_per_step(recipe, gpus)
    reinforced = recipe.method == "tdm_r1"
    always = _always(recipe, size, roles, gpus)
    text = {"text encoders": _frozen_width(recipe) * float(sum(size.text.values()))}
    scoring = {"VAE": _frozen_width(recipe) * float(size.vae), "reward": reward_bytes(recipe)}
    encoding = {name: always[name] for name in ("base", "roles")} | scoring | text
    resident = always | ({} if memory.precompute_text else text)
    resident |= {} if memory.offload else scoring
    query = 4.0 * _QUERY_WIDTH * size.dim * (size.image_tokens(side) + size.text_tokens)
    pictures = memory.decode_batch or max(1, DECODE_LIMIT // side**2)
    decoded = _decoded(recipe, size, side)
    guided = 1 if recipe.evaluation.guidance == 1.0 else 2
    evaluating = max(EVALUATED * guided * query, min(EVALUATED, pictures) * decoded)
    whole = {"gathered": 4.0 * size.parameters if recipe.zero_stage == 3 else 0.0}
    found = [Phase("encode prompts", encoding)] if memory.precompute_text else []
    found.append(Phase("evaluate", resident | scoring | whole | {"working": evaluating}))
    if recipe.method != "sft":
        resident |= _stored(recipe, size, gpus, side)
        found.append(Phase("roll out", resident | whole | {"working": rows * query}))
    if reinforced:
        decode = {"working": min(rows, pictures) * decoded}
        found.append(Phase("decode and score", resident | scoring | decode))
    resident |= {"gradients": _gradients(recipe, roles, gpus)}
    if recipe.method != "sft":
        stacked = queries.STACKED if reinforced else 2
        asked = {"gathered": 2 * reinforced * whole["gathered"], "working": stacked * rows * query}
        found.append(Phase("ask", resident | asked))
    if reinforced and recipe.reinforcement.transfer:
        found.append(Phase("transfer", resident | {"working": 4.0 * size.parameters}))
    return (*found, Phase("train", resident | whole | _graphs(recipe, size, rows, side)))


def _always(recipe: Recipe, size: Size, roles: dict[str, int], gpus: int) -> dict[str, float]:
    """Base, roles and optimizer, in every phase; and the bf16 copies that autocast makes."""
    whole = [count for count in roles.values() if count == size.parameters]
    cast = 2.0 * size.parameters if whole and recipe.precision == "bf16" else 0.0
    shared = gpus if recipe.zero_stage == 3 else 1
    return {
        "base": _frozen_width(recipe) * float(size.parameters + size.buffers),
        "roles": 4.0 * (sum(roles.values()) / shared + len(whole) * size.buffers),
        "optimizer": (12.0 / gpus if recipe.zero_stage else 8.0) * _trained(recipe, roles),
        "cast weights": cast,
    }


def _trained(recipe: Recipe, roles: dict[str, int]) -> int:
    return sum(count for name, count in roles.items() if name in TRAINED[recipe.method])


def _gradients(recipe: Recipe, roles: dict[str, int], gpus: int) -> float:
    whole = 4.0 * _trained(recipe, roles)
    return whole / gpus + _BUCKET if recipe.zero_stage >= 2 else whole


def _graphs(recipe: Recipe, size: Size, rows: int, side: int) -> dict[str, float]:
    """What the backward passes of a micro-step need: of one role at a time."""
    dual = size.dual_blocks
    kept = (size.blocks - dual) * block_bytes(recipe, size, side, False, kept=True)
    if dual:
        kept += dual * block_bytes(recipe, size, side, True, kept=True)
    found = {"kept": rows * kept}
    if recipe.memory.checkpoint_blocks:
        found["recomputed"] = rows * block_bytes(recipe, size, side, dual > 0)
    elif _frozen_width(recipe) == 4 and recipe.precision == "bf16":
        found["kept"] += 2.0 * size.parameters  # weights cast for the graph
    return found


def _frozen_width(recipe: Recipe) -> int:
    """Bytes of a number that no optimizer steps."""
    return 2 if recipe.memory.base == "bf16" else 4


def rows_per_step(recipe: Recipe, gpus: int) -> int:
    """Rows of one micro-step on one GPU."""
    if recipe.method == "sft":
        return recipe.data.batch_size // gpus
    return recipe.rollout.micro_groups * recipe.rollout.group_size


def _stored(recipe: Recipe, size: Size, gpus: int, side: int) -> dict[str, float]:
    """Latents of every step, and the texts, of all pictures of an iteration on one GPU."""
    if recipe.method == "sft":
        return {}
    rollout = recipe.rollout
    share = rollout.num_prompts // gpus
    config: Any = size.transformer.config
    latent = 4.0 * config.in_channels * (side // size.vae_scale) ** 2
    text = _frozen_width(recipe) * float(size.text_tokens * size.text_width)
    # one prompt's rows share their text; several prompts' are copied for every row
    copies = share if rollout.micro_groups == 1 else share * rollout.group_size
    return {
        "trajectories": (rollout.steps + 1) * share * rollout.group_size * latent,
        "texts": copies * text,
    }


def block_bytes(recipe: Recipe, size: Size, side: int, twice: bool, *, kept: bool = False) -> float:
    """Bytes per row of one block's graph; `kept`: of those, what stays until its backward pass."""
    full = recipe.roles.kind == "full" or bool(recipe.roles.full)
    residual = 4 if full else _frozen_width(recipe)
    activation = 2 if recipe.precision == "bf16" else 4
    streams = 3 if twice else 2
    image: float
    text: float
    if kept and recipe.memory.checkpoint_blocks:
        image, text = residual + (streams - 1) * activation, residual + activation
    else:
        kind = "full" if full else "lora"
        wide_image, wide_text = (
            WIDE[size.family, attends][kind][recipe.precision] for attends in (twice, False)
        )
        image = streams * residual + wide_image * activation
        text = 2 * residual + wide_text * activation
    return size.dim * (size.image_tokens(side) * image + size.text_tokens * text)


def _decoded(recipe: Recipe, size: Size, side: int) -> float:
    """Bytes per picture while the VAE's decoder works at full resolution."""
    per_channel = 2 + 3 * 4 if recipe.precision == "bf16" else 4 * _frozen_width(recipe)
    return float(side**2 * size.decoder_width * per_channel)


def reward_bytes(recipe: Recipe) -> float:
    """Of the models behind the rewards: GenEval's detector and CLIP; OCR reads on the CPU.

    A callable of the user's own counts for nothing: it is not known.
    """
    spec = f"{recipe.reward}+{recipe.evaluation.reward}"
    total = 4.0 * _DETECTOR if "geneval" in spec and "detector=shapes" not in spec else 0.0
    return total + (4.0 * _CLIP if "clip=" in spec else 0.0)
