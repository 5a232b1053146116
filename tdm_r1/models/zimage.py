"""Z-Image (single-stream DiT), parameter names and shapes as published in diffusers format.

Shapes: B batch, T caption tokens as given, P caption tokens padded to a multiple of 32, n image
tokens, I image tokens padded to a multiple of 32, S = I + P, D width, N heads, H head width, K
steps, M modulation vectors of all layers, E text width, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tdm_kernels import Ops
from torch import Tensor, nn

from tdm_r1.errors import ConfigError
from tdm_r1.models.checkpointing import block_runner
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.config import parse_config
from tdm_r1.models.layers import (
    Attention,
    Transformer,
    check_latent_size,
    patchify,
    timestep_features,
)
from tdm_r1.models.packing import Layer, Packable
from tdm_r1.models.zimage_layout import padded_lengths, position_ids, rope_table

QK_EPS = 1e-5
FINAL_EPS = 1e-6


@dataclass(frozen=True)
class ZImageConfig:
    """Fields of the published config.json."""

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    siglip_feat_dim: int | None = None
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    def __post_init__(self) -> None:
        if len(self.all_patch_size) != 1 or tuple(self.all_f_patch_size) != (1,):
            raise ConfigError(
                f"all_patch_size={self.all_patch_size}, all_f_patch_size={self.all_f_patch_size}: "
                "only one spatial patch size and the frame patch size (1,) are supported"
            )
        if self.n_kv_heads != self.n_heads:
            raise ConfigError(f"n_kv_heads={self.n_kv_heads} must equal n_heads={self.n_heads}")
        if self.siglip_feat_dim is not None:
            raise ConfigError(
                f"siglip_feat_dim={self.siglip_feat_dim}: the Omni variant is unsupported"
            )
        if sum(self.axes_dims) * self.n_heads != self.dim or len(self.axes_dims) != 3:
            raise ConfigError(
                f"axes_dims={self.axes_dims} must be three widths that sum to "
                f"dim / n_heads = {self.dim / self.n_heads:g}"
            )

    @property
    def patch_size(self) -> int:
        """Side of a square patch, in latent pixels."""
        return self.all_patch_size[0]

    @property
    def patch_key(self) -> str:
        """Name of the only patch embedding and final layer in the checkpoint."""
        return f"{self.patch_size}-1"

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return min(self.dim, 256)

    @classmethod
    def from_dict(cls, values: dict) -> ZImageConfig:
        """Build from a config.json dict; ConfigError names what cannot be honoured."""
        return parse_config(cls, values)


@dataclass(frozen=True)
class ZImageContext:
    """What one prompt batch and one latent size fix; 1 row serves any batch (one prompt's group).

    lengths_B counts the rows of the joint sequence that are attended: all up to a caption's batch
    padding, which comes last. None when no caption needs any.
    """

    text_BPD: Tensor
    rope_image_BINH: Tensor
    rope_joint_BSNH: Tensor
    lengths_B: Tensor | None
    num_image_pads: int


class FeedForward(Packable):
    """W2 (silu(W1 x) * (W3 x))."""

    groups = ("up", "down")

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim / 3 * 8)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def siblings(self, group: str) -> list[Any]:
        """Return w1, w3 ("up") or w2 ("down")."""
        return [self.w2] if group == "down" else [self.w1, self.w3]

    def forward(self, x_BTD: Tensor, ops: Ops) -> Tensor:
        joint = self.joint("up")
        if joint is not None:
            gate, up = joint(x_BTD).chunk(2, dim=-1)
        else:
            gate, up = self.w1(x_BTD), self.w3(x_BTD)
        return self.linear("down", ops.swiglu(gate, up))


class Block(Layer):
    """Sandwich-norm block: RMSNorm before and after attention and MLP, modulated unless `plain`."""

    def __init__(self, config: ZImageConfig, *, plain: bool = False) -> None:
        super().__init__()
        dim, self.eps = config.dim, config.norm_eps
        self.attention = Attention(
            dim, config.n_heads, bias=False, qk_norm=config.qk_norm, eps=QK_EPS
        )
        self.feed_forward = FeedForward(dim)
        self.attention_norm1 = nn.RMSNorm(dim, eps=self.eps)
        self.ffn_norm1 = nn.RMSNorm(dim, eps=self.eps)
        self.attention_norm2 = nn.RMSNorm(dim, eps=self.eps)
        self.ffn_norm2 = nn.RMSNorm(dim, eps=self.eps)
        if not plain:
            self.adaLN_modulation = nn.ModuleList([nn.Linear(config.time_dim, 4 * dim)])

    def norm(self, h_BTD: Tensor, ops: Ops, mod_4B1D: Tensor | None = None) -> Tensor:
        """Return what attention reads: the normalised stream, scaled unless the block is plain."""
        scale1, ops = None if mod_4B1D is None else mod_4B1D[0], self.ops_for(ops)
        return ops.norm_modulate(h_BTD, scale1, weight_D=self.attention_norm1.weight, eps=self.eps)

    def forward(
        self,
        h_BTD: Tensor,
        y_BTD: Tensor,
        ops: Ops,
        rope_BTNH: Tensor,
        lengths_B: Tensor | None = None,
        mod_4B1D: Tensor | None = None,
        following: tuple[Block, Tensor | None] | None = None,
        num_rows: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the updated stream and, of a `following` block and its modulation, the `norm`.

        y is this block's own `norm` of h: one pass over the stream ends a block and begins the
        next. Only the first `num_rows` rows are returned, if given (all rows are attended).
        """
        _, gate1, scale2, gate2 = (None,) * 4 if mod_4B1D is None else mod_4B1D.unbind()
        mine = self.ops_for(ops)
        o = self.attention.attend(y_BTD, mine, rope_BTNH, lengths_B, num_rows)
        h_BTD, y_BTD = mine.gate_residual_norm(
            h_BTD[:, :num_rows],
            o,
            gate1,
            scale2,
            branch_weight_D=self.attention_norm2.weight,
            weight_D=self.ffn_norm1.weight,
            eps=self.eps,
        )
        f, weight = self.feed_forward(y_BTD, mine), self.ffn_norm2.weight
        if following is None:
            h_BTD = ops.gate_residual(h_BTD, f, gate2, branch_weight_D=weight, eps=self.eps)
            return h_BTD, None
        block, mod = following
        return block.ops_for(ops).gate_residual_norm(
            h_BTD,
            f,
            gate2,
            None if mod is None else mod[0],
            branch_weight_D=weight,
            weight_D=block.attention_norm1.weight,
            eps=self.eps,
        )


def run_blocks(
    blocks: Sequence[Block],
    h_BTD: Tensor,
    ops: Ops,
    rope_BTNH: Tensor,
    lengths_B: Tensor | None,
    mods: Sequence[Tensor | None],
    num_rows: int | None = None,
    checkpoint_blocks: bool = False,
) -> Tensor:
    """Return the stream after all blocks; the last one returns only its first `num_rows` rows."""
    if not blocks:
        return h_BTD
    run = block_runner(checkpoint_blocks)
    y, pairs = blocks[0].norm(h_BTD, ops, mods[0]), zip(blocks[1:], mods[1:], strict=True)
    for block, mod, following in zip(blocks, mods, pairs, strict=False):
        h_BTD, y = run(block, h_BTD, y, ops, rope_BTNH, lengths_B, mod, following)
    return run(blocks[-1], h_BTD, y, ops, rope_BTNH, lengths_B, mods[-1], None, num_rows)[0]


class FinalLayer(nn.Module):
    """Parameters of the output layer: modulation scale, then the linear back to patches."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, config.dim))


class ZImageTransformer(Transformer):
    """The Z-Image velocity field, in the sign and time of SD3: v = eps - x0 at t = 1000 sigma.

    The published network predicts x0 - eps and takes 1 - sigma: `sign` and `modulation` convert.
    """

    family = "zimage"
    sign = -1.0
    recordable = ("refine", "join")

    def __init__(self, config: ZImageConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        dim, channels = config.dim, config.patch_size**2 * config.in_channels
        self.all_x_embedder: Any = nn.ModuleDict({config.patch_key: nn.Linear(channels, dim)})
        self.all_final_layer: Any = nn.ModuleDict({config.patch_key: FinalLayer(config)})
        refiners = range(config.n_refiner_layers)
        self.noise_refiner: Any = nn.ModuleList(Block(config) for _ in refiners)
        self.context_refiner: Any = nn.ModuleList(Block(config, plain=True) for _ in refiners)
        self.t_embedder: Any = nn.ModuleDict(
            {
                "mlp": nn.Sequential(
                    nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, config.time_dim)
                )
            }
        )
        self.cap_embedder = nn.Sequential(
            nn.RMSNorm(config.cap_feat_dim, eps=config.norm_eps),
            nn.Linear(config.cap_feat_dim, dim),
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.layers: Any = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.init_runtime(backend, dim // config.n_heads)

    def siblings(self, group: str) -> list[Any]:
        """Return the blocks' modulation linears in the order `forward` consumes them."""
        return [block.adaLN_modulation[0] for block in (*self.noise_refiner, *self.layers)]

    def layers_by_name(self) -> dict[str, Layer]:
        """Return the refiner's blocks on the image and those over image and text."""
        pairs = (("noise_refiner", self.noise_refiner), ("layers", self.layers))
        return {f"{name}.{i}": block for name, blocks in pairs for i, block in enumerate(blocks)}

    def context(self, cond: Condition, height: int, width: int) -> ZImageContext:
        """Return the refined captions, the rotation tables and how many rows are attended.

        Captions are padded with a learned, attended token to P_i = ceil32(length_i); only the rows
        from P_i up to the batch's longest P are not. Raises ConfigError for sizes that are not
        whole patches or exceed the rotation tables, an empty caption, or features of another width.
        """
        config, device = self.config, cond.tokens_BTE.device
        check_latent_size(height, width, config.patch_size, config.axes_lens[1:])
        padded = padded_lengths(cond, config)
        num_text = max(padded)
        text_BPD = self.embed_captions(cond, num_text)
        # One row of tables serves the whole batch when all captions pad to the same length.
        if min(padded) == num_text:
            padded, lengths_B = padded[:1], None
        else:
            lengths_B = torch.tensor(padded, device=device)
        text_ids, image_ids = position_ids(
            padded, height // config.patch_size, width // config.patch_size, device
        )
        rope_image = rope_table(image_ids, config)
        rope_text = rope_table(text_ids, config).expand(len(padded), -1, -1, -1)
        plain = [None] * len(self.context_refiner)
        text_BPD = self.run_blocks(self.context_refiner, text_BPD, rope_text, lengths_B, plain)
        num_padded_image = image_ids.shape[1]
        return ZImageContext(
            text_BPD,
            rope_image,
            torch.cat([rope_image, rope_text], dim=1),
            # Image rows come first and are all attended, learned pads included.
            None if lengths_B is None else num_padded_image + lengths_B,
            num_padded_image - height * width // config.patch_size**2,
        )

    def embed_captions(self, cond: Condition, num_text: int) -> Tensor:
        """Return embedded captions [B, P, D], the learned pad token from each one's length on."""
        tokens = cond.tokens_BTE[:, :num_text].to(self.dtype)
        tokens = F.pad(tokens, (0, 0, 0, num_text - tokens.shape[1]))
        rows = torch.arange(num_text, device=tokens.device)
        valid_BP1 = (rows < cond.lengths_B[:, None])[..., None]
        # Padding may hold anything: clear it first, or a NaN there would reach the gradients.
        tokens = tokens.masked_fill(~valid_BP1, 0)
        norm, linear = self.cap_embedder
        tokens = self.ops.norm_modulate(tokens, weight_D=norm.weight, eps=self.config.norm_eps)
        return torch.where(valid_BP1, linear(tokens).to(self.dtype), self.cap_pad_token)

    def modulation(self, context: ZImageContext, t_KB: Tensor) -> Tensor:
        """Return every block's (1 + s1, tanh g1, 1 + s2, tanh g2), then the final 1 + s.

        fp32 [K, M, B, 1, D]. c = MLP(features(t_scale (1 - sigma))); vectors = W c + b, the final
        layer's W silu(c) + b; all steps in one pass over the weights.
        """
        config = self.config
        features = timestep_features((1000 - t_KB.float()) / 1000 * config.t_scale)
        c_KBE = self.t_embedder["mlp"](features.to(self.dtype))
        chunks = self.project_modulation(c_KBE).float().unflatten(-1, (-1, 2, config.dim))
        scales, gates = 1 + chunks[..., 0, :], chunks[..., 1, :].tanh()
        blocks = torch.stack([scales, gates], dim=3).flatten(2, 3)
        final = self.all_final_layer[config.patch_key].adaLN_modulation(c_KBE).float()
        table_KBMD = torch.cat([blocks, 1 + final[:, :, None]], dim=2)
        return table_KBMD.movedim(2, 1)[:, :, :, None]

    def forward(self, x_BChw: Tensor, context: ZImageContext, mod_MB1D: Tensor) -> Tensor:
        """Return x0 - eps in patches [B, n, p p C], for fp32 latents x and a step's modulation.

        Context and modulation have B rows, or one row that serves the whole batch.
        """
        h_BnD = self.embed_patches(x_BChw)
        num_image = h_BnD.shape[1]
        if context.num_image_pads:
            pads = self.x_pad_token.expand(h_BnD.shape[0], context.num_image_pads, -1)
            h_BnD = torch.cat([h_BnD, pads], dim=1)
        return self.denoise(h_BnD, context, mod_MB1D, num_image)

    def embed_patches(self, x_BChw: Tensor) -> Tensor:
        """Return the image rows of fp32 latents, [B, n, D]."""
        patches = patchify(x_BChw, self.config.patch_size, self.dtype, channels_last=True)
        return self.all_x_embedder[self.config.patch_key](patches).to(self.dtype)

    def denoise(
        self, h_BID: Tensor, context: ZImageContext, mod_MB1D: Tensor, num_image: int
    ) -> Tensor:
        """Return x0 - eps in patches, of the first `num_image` of the padded image rows."""
        first = 4 * len(self.noise_refiner)
        h = self.run("refine", h_BID, context.rope_image_BINH, mod_MB1D[:first])
        h = torch.cat([h, context.text_BPD.expand(h.shape[0], -1, -1)], dim=1)
        rope, lengths_B, mod_MB1D = context.rope_joint_BSNH, context.lengths_B, mod_MB1D[first:]
        h = self.run("join", h, rope, mod_MB1D[:-1], lengths_B, num_image)
        y = self.ops.norm_modulate(h, mod_MB1D[-1], eps=FINAL_EPS)
        return self.all_final_layer[self.config.patch_key].linear(y)

    def refine(self, h_BID: Tensor, rope_BINH: Tensor, mod_MB1D: Tensor) -> Tensor:
        """Return the image rows after the refiner's blocks."""
        mods = mod_MB1D.unflatten(0, (-1, 4)).unbind()
        return self.run_blocks(self.noise_refiner, h_BID, rope_BINH, None, mods)

    def join(
        self,
        h_BSD: Tensor,
        rope_BSNH: Tensor,
        mod_MB1D: Tensor,
        lengths_B: Tensor | None,
        num_image: int,
    ) -> Tensor:
        """Return the first `num_image` rows after the blocks over image and text."""
        mods = mod_MB1D.unflatten(0, (-1, 4)).unbind()
        return self.run_blocks(self.layers, h_BSD, rope_BSNH, lengths_B, mods, num_image)

    def run_blocks(
        self,
        blocks: Any,
        h_BTD: Tensor,
        rope_BTNH: Tensor,
        lengths_B: Tensor | None,
        mods: Sequence[Tensor | None],
        num_rows: int | None = None,
    ) -> Tensor:
        """Return `run_blocks` with this model's ops, recomputed in the backward pass if asked."""
        checkpointed = self.checkpoint_blocks
        return run_blocks(
            blocks, h_BTD, self.ops, rope_BTNH, lengths_B, mods, num_rows, checkpointed
        )
