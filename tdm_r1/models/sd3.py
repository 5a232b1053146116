"""Stable Diffusion 3 and 3.5 (MMDiT), parameter names and shapes as published in diffusers format.

Shapes: B batch, T text tokens, n image tokens, D width, N heads, H head width, K steps, M
modulation vectors of all layers, E text width, C latent channels, h w latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_r1.errors import ConfigError
from tdm_r1.models.checkpointing import block_runner
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.config import parse_config
from tdm_r1.models.layers import (
    Transformer,
    check_latent_size,
    patchify,
    timestep_features,
)
from tdm_r1.models.packing import Layer
from tdm_r1.models.sd3_blocks import AdaLayerNorm, Following, JointBlock


@dataclass(frozen=True)
class SD3Config:
    """Fields of the published config.json; `sample_size` is the default latent side."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        if self.qk_norm not in (None, "rms_norm"):
            raise ConfigError(
                f"qk_norm={self.qk_norm!r} is not supported; allowed: None, 'rms_norm'"
            )
        if self.caption_projection_dim != self.dim:
            raise ConfigError(
                f"caption_projection_dim={self.caption_projection_dim} must equal "
                f"num_attention_heads * attention_head_dim = {self.dim}"
            )
        if self.out_channels not in (None, self.in_channels):
            raise ConfigError(f"out_channels={self.out_channels} must be {self.in_channels}")
        if not self.pos_embed_max_size:
            raise ConfigError(
                "pos_embed_max_size must be positive: models without it are unsupported"
            )

    @property
    def dim(self) -> int:
        """Width D."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict) -> SD3Config:
        """Build from a config.json dict; ConfigError names what cannot be honoured."""
        return parse_config(cls, values)


@dataclass(frozen=True)
class SD3Context:
    """What a prompt batch and a latent size fix; one row serves any batch (a prompt's group)."""

    tokens_BTD: Tensor
    pooled_BD: Tensor
    position_1nD: Tensor


class PatchEmbed(nn.Module):
    """Holder of the patch convolution and of the position table [1, side^2, D]."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.dim, kernel_size=p, stride=p)
        table = position_table(config.dim, config.pos_embed_max_size, config.sample_size // p)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", table[None])

    @property
    def weight(self) -> Tensor:
        """The convolution as a linear on patches: [D, C p p]."""
        return self.proj.weight.flatten(1)

    @property
    def bias(self) -> Tensor:
        """Bias of the convolution, [D]."""
        assert self.proj.bias is not None
        return self.proj.bias


class MLP(nn.Module):
    """Linear, SiLU, linear, under the names of the checkpoint."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """Embeddings of the time and of the pooled text, whose sum drives every modulation."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.timestep_embedder = MLP(256, config.dim)
        self.text_embedder = MLP(config.pooled_projection_dim, config.dim)


class SD3Transformer(Transformer):
    """The MMDiT velocity field: v = eps - x0 of latents x at t = 1000 sigma, given text."""

    family = "sd3"
    groups = ("modulation", "output")
    recordable = ("blocks",)

    def __init__(self, config: SD3Config, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbed(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        self.transformer_blocks: Any = nn.ModuleList(
            JointBlock(
                dim,
                config.num_attention_heads,
                qk_norm=config.qk_norm is not None,
                dual=index in config.dual_attention_layers,
                last=index == config.num_layers - 1,
            )
            for index in range(config.num_layers)
        )
        self.norm_out = AdaLayerNorm(dim, 2)
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.in_channels)
        self.init_runtime(backend, config.attention_head_dim)

    def siblings(self, group: str) -> list[Any]:
        """Return the modulation linears in the order `forward` consumes them, or the last one."""
        if group == "output":
            return [self.proj_out]
        blocks = self.transformer_blocks
        pairs = ((block.norm1.linear, block.norm1_context.linear) for block in blocks)
        return [*chain.from_iterable(pairs), self.norm_out.linear]

    def layers_by_name(self) -> dict[str, Layer]:
        """Return the joint blocks."""
        return {f"transformer_blocks.{i}": block for i, block in enumerate(self.transformer_blocks)}

    def context(self, cond: Condition, height: int, width: int) -> SD3Context:
        """Return embedded text, embedded pooled text, and the position table of this latent size.

        Raises ConfigError for a size that is not a multiple of the patch or beyond the table, or a
        condition without pooled features or of another width.
        """
        config, p = self.config, self.config.patch_size
        side = config.pos_embed_max_size
        check_latent_size(height, width, p, (side, side))
        rows, cols = height // p, width // p
        top, left = (side - rows) // 2, (side - cols) // 2
        table = self.pos_embed.pos_embed.view(side, side, -1)
        position_1nD = table[top : top + rows, left : left + cols].reshape(1, rows * cols, -1)
        pooled_BE = check_condition(cond, config)
        tokens_BTD = self.context_embedder(cond.tokens_BTE.to(self.dtype))
        pooled_BD = self.time_text_embed.text_embedder(pooled_BE.to(self.dtype))
        # The convolution's bias joins the table so that the forward adds both at once. Under
        # autocast the linears return half precision; residual streams stay in the weights' dtype.
        return SD3Context(tokens_BTD.to(self.dtype), pooled_BD, position_1nD + self.pos_embed.bias)

    def modulation(self, context: SD3Context, t_KB: Tensor) -> Tensor:
        """Return every layer's shifts, 1 + scales and gates for K steps: fp32 [K, M, B, 1, D].

        c = MLP(features(t)) + MLP(pooled); vectors = W silu(c) + b, all steps in one pass over W.
        """
        features = timestep_features(t_KB).to(self.dtype)
        return self.modulate(self.time_text_embed.timestep_embedder(features) + context.pooled_BD)

    def modulate(self, temb_KBD: Tensor) -> Tensor:
        """Return `modulation` for the sums of both embeddings."""
        chunks = self.project_modulation(F.silu(temb_KBD)).float()
        table_KMBD = chunks.unflatten(-1, (-1, self.config.dim)).movedim(2, 1)
        return (table_KMBD + self.scale_offsets(chunks.device))[:, :, :, None]

    def forward(self, x_BChw: Tensor, context: SD3Context, mod_MB1D: Tensor) -> Tensor:
        """Return v = eps - x0 in patches [B, n, p p C], for fp32 latents x and a step's modulation.

        Context and modulation have B rows, or one row that serves the whole batch.
        """
        b = x_BChw.shape[0]
        patches = patchify(x_BChw, self.config.patch_size, self.dtype, channels_last=False)
        h_BnD = F.linear(patches, self.pos_embed.weight) + context.position_1nD
        return self.run("blocks", h_BnD, context.tokens_BTD.expand(b, -1, -1), mod_MB1D)

    def blocks(self, h_BnD: Tensor, c_BTD: Tensor, mod_MB1D: Tensor) -> Tensor:
        """Return the patches of v [B, n, p p C] for embedded patches and text."""
        ops, blocks, mods = self.ops, self.transformer_blocks, mod_MB1D.split(self.chunk_sizes())
        y_BnD, yc_BTD = blocks[0].norms(h_BnD, c_BTD, mods[0], ops)
        run = block_runner(self.checkpoint_blocks)
        for index, block in enumerate(blocks):
            following = self.following(index, mods[index + 1])
            h_BnD, c_BTD, y_BnD, yc_BTD = run(
                block, h_BnD, c_BTD, y_BnD, yc_BTD, mods[index], following, ops
            )
        return self.linear("output", y_BnD)

    def chunk_sizes(self) -> list[int]:
        """Return how many modulation vectors each block has, and the output norm."""
        return [*(block.num_chunks for block in self.transformer_blocks), 2]

    def following(self, index: int, mod_MB1D: Tensor) -> Following:
        """Return scale and shift of the norms after block `index`: image's, and text's or none."""
        if index + 1 == len(self.transformer_blocks):
            return (mod_MB1D[0], mod_MB1D[1]), (None, None), self.ops
        block = self.transformer_blocks[index + 1]
        image, text = block.image_modulation(mod_MB1D), block.text_modulation(mod_MB1D)
        return image, text, block.ops_for(self.ops)

    def scale_offsets(self, device: torch.device) -> Tensor:
        """Return [M, 1, 1]: 1 where a modulation vector is a scale, 0 elsewhere."""
        flags = [flag for block in self.transformer_blocks for flag in block.scale_chunks()]
        return torch.tensor([*flags, True, False], dtype=torch.float32, device=device)[
            :, None, None
        ]


def check_condition(cond: Condition, config: SD3Config) -> Tensor:
    """Return the pooled features; ConfigError unless all widths are what the model takes."""
    if cond.pooled_BE is None:
        raise ConfigError("an SD3 model needs pooled text features, and the condition has none")
    for name, got, want in (
        ("text", cond.tokens_BTE.shape[-1], config.joint_attention_dim),
        ("pooled text", cond.pooled_BE.shape[-1], config.pooled_projection_dim),
    ):
        if got != want:
            raise ConfigError(f"{name} features are {got} wide, this model takes {want}")
    return cond.pooled_BE


def position_table(dim: int, side: int, base: int) -> Tensor:
    """Return the 2-D sine-cosine table [side^2, dim], fp32, row-major.

    Each half of `dim` encodes one coordinate (column first) as [sin(x w), cos(x w)], x = index *
    base / side, w_i = 10000^(-i / (dim / 4)). Source: SD3, arXiv 2403.03206, section 4.
    """
    x = torch.arange(side, dtype=torch.float32) / (side / base)
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = x.double()[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=-1).float()
    columns, rows = axis.expand(side, side, -1), axis[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, dim)
