"""ComfyUI's names for the linears of SD3 and Z-Image, and adapters on its fused projections.

ComfyUI keeps the names of the original repositories: the query, key and value projections are one
matrix [3 D, D] called `qkv`. Its loader takes any name of its own model ("diffusion_model.<name>").
It also takes diffusers' names, for SD3 under another prefix, and for Z-Image its first versions
knew those of `layers` alone, not of the refiners; so what is written here are its own names.
Source: ComfyUI, comfy/lora.py (model_lora_keys_unet) and comfy/utils.py (mmdit_to_diffusers,
z_image_to_diffusers). Read there, not run: ComfyUI itself is no dependency of the tests.

Adapters (A_i, B_i) of rank r on the three projections become one of rank 3 r:

    A = [A_q; A_k; A_v]        B = blockdiag(B_q, B_k, B_v)        B A = [B_q A_q; B_k A_k; B_v A_v]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.models.layers import name_some
from tdm_r1.models.lora import LoraTensors

# name inside a ComfyUI block -> our names, whose outputs it holds one after the other. The text
# side's modulation (norm1_context) is absent: its last block orders shift and scale the other way.
_SD3 = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
}
_ZIMAGE = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "feed_forward.w1": ("feed_forward.w1",),
    "feed_forward.w2": ("feed_forward.w2",),
    "feed_forward.w3": ("feed_forward.w3",),
    "adaLN_modulation.0": ("adaLN_modulation.0",),
}
_OUR_BLOCK = re.compile(r"(transformer_blocks|noise_refiner|context_refiner|layers)\.(\d+)\.(.+)")
_THEIR_BLOCK = re.compile(r"(joint_blocks|noise_refiner|context_refiner|layers)\.(\d+)\.(.+)")


def to_comfyui(tensors: Mapping[str, LoraTensors]) -> dict[str, LoraTensors]:
    """Rename and fuse: our module name -> ComfyUI's, without its "diffusion_model." prefix.

    Scales that differ inside one fused matrix are folded into its B. Raises ConfigError naming the
    modules that have no place in ComfyUI's blocks.
    """
    groups: dict[str, list[LoraTensors | None]] = {}
    unknown = []
    for name, entry in tensors.items():
        place = _their_place(name)
        if place is None:
            unknown.append(name)
            continue
        theirs, index, count = place
        groups.setdefault(theirs, [None] * count)[index] = entry
    if unknown:
        raise ConfigError(f"no ComfyUI name is known for {name_some(unknown)}")
    return {name: _fuse(parts) for name, parts in groups.items()}


def from_comfyui(tensors: Mapping[str, LoraTensors]) -> dict[str, LoraTensors]:
    """Undo `to_comfyui`; names that are ours already pass through.

    A B that is block-diagonal is taken apart exactly. One that is not (trained on the fused matrix)
    keeps its whole A in each of the three. Raises LoadError for a fused B whose rows do not divide,
    and for a module that has a fused adapter and one of its own.
    """
    ours: dict[str, LoraTensors] = {}
    for name, entry in tensors.items():
        names = _our_names(name)
        twice = [known for known in names if known in ours]
        if twice:
            raise LoadError(f"LoRA with two adapters for {name_some(twice)}, one of them {name}")
        if len(names) == 1:
            ours[names[0]] = entry
        elif entry.b_Or.shape[0] % len(names):
            raise LoadError(
                f"LoRA of {name}: {entry.b_Or.shape[0]} rows do not split in {len(names)}"
            )
        else:
            ours |= zip(names, _unfuse(entry, len(names)), strict=True)
    return ours


def _their_place(name: str) -> tuple[str, int, int] | None:
    """ComfyUI's name, this module's place in its fused matrix, and how many places that has."""
    match = _OUR_BLOCK.fullmatch(name)
    if match is None:
        return None
    stack, number, rest = match.groups()
    sd3 = stack == "transformer_blocks"
    for theirs, ours in (_SD3 if sd3 else _ZIMAGE).items():
        if rest in ours:
            stack = "joint_blocks" if sd3 else stack
            return f"{stack}.{number}.{theirs}", ours.index(rest), len(ours)
    return None


def _our_names(name: str) -> list[str]:
    match = _THEIR_BLOCK.fullmatch(name)
    if match is None:
        return [name]
    stack, number, rest = match.groups()
    sd3 = stack == "joint_blocks"
    stack = "transformer_blocks" if sd3 else stack
    names = (_SD3 if sd3 else _ZIMAGE).get(rest)
    return [f"{stack}.{number}.{ours}" for ours in names] if names else [name]


def _fuse(parts: Sequence[LoraTensors | None]) -> LoraTensors:
    """One adapter over the rows of all parts; a part that is None adds rows of zeros."""
    present = [part for part in parts if part is not None]
    if len(parts) == 1:
        return present[0]
    scales = {part.scale for part in present}
    scale = scales.pop() if len(scales) == 1 else 1.0
    rows = present[0].b_Or.shape[0]  # equal for all: as many key and value heads as query heads
    b = present[0].b_Or.new_zeros(rows * len(parts), sum(part.a_rI.shape[0] for part in present))
    column = 0
    for index, part in enumerate(parts):
        if part is not None:
            rank = part.a_rI.shape[0]
            place = b[index * rows : (index + 1) * rows, column : column + rank]
            place.copy_(part.b_Or if part.scale == scale else part.b_Or * (part.scale / scale))
            column += rank
    return LoraTensors(torch.cat([part.a_rI for part in present]), b, scale)


def _unfuse(fused: LoraTensors, count: int) -> list[LoraTensors]:
    blocks = fused.b_Or.chunk(count)
    rank = fused.a_rI.shape[0] // count
    own = [block[:, i * rank : (i + 1) * rank] for i, block in enumerate(blocks)]
    outside = fused.b_Or.count_nonzero() - sum(block.count_nonzero() for block in own)
    if rank * count != fused.a_rI.shape[0] or outside:
        return [LoraTensors(fused.a_rI, block, fused.scale) for block in blocks]
    return [
        LoraTensors(a, block.contiguous(), fused.scale)
        for a, block in zip(fused.a_rI.chunk(count), own, strict=True)
    ]
