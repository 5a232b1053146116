"""Latents <-> images: diffusers' AutoencoderKL encodes and holds the weights, `Decoder` decodes.

Shapes: B images, C latent channels, h w latent size, H W pixels, O channels of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tdm_kernels import Ops, select
from tdm_kernels.reference import GroupNorm
from torch import Tensor, nn

from tdm_r1.errors import LoadError

_MAX_RECORDED = 2**13  # numbers in the latents: 8 images of 64 pixels a side
TILE_UNIT = 4  # latents: a quarter of a tile's side, its overlap with the next, is whole


class VAE:
    """An AutoencoderKL that speaks normalised latents and images in [0, 1].

    Normalised: (z - shift_factor) * scaling_factor, what the diffusion model sees.
    """

    def __init__(self, model, *, backend: str = "auto") -> None:
        """`model` is an AutoencoderKL, kept channels last as its convolutions want it."""
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.dtype, self.backend = model.dtype, backend
        self._bind()
        config = model.config
        self.scaling = config.scaling_factor
        self.shift = config.shift_factor or 0.0
        self.latent_channels = config.latent_channels
        self.scale_factor = 2 ** (len(config.block_out_channels) - 1)
        self.sample_size = config.sample_size

    def to(self, device: torch.device) -> VAE:
        """Move the weights, and return self."""
        if self.model.device != device:
            self.model.to(device)
            self._bind()
        return self

    def parameters(self) -> list[Tensor]:
        """What decoding reads."""
        return self.decoder.sources

    def _bind(self) -> None:
        model = self.model
        ops = select(self.backend, model.device, model.dtype, grad=False)
        self.decoder = Decoder(model.decoder, model.post_quant_conv, ops)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Return images_B3HW fp32 in [0, 1]: D(latents_BChw / scaling + shift)."""
        return self.unclamped(latents_BChw).clamp_(0.0, 1.0)

    def decode_tiled(self, latents_BChw: Tensor, side: int) -> Tensor:
        """Decode in tiles of `side` x `side` latents, `TILE_UNIT` of them or a multiple.

        A quarter of a tile lies over the next one, to the right or below, and there the pictures
        pass linearly from one to the other: for less memory, what is far apart in the picture no
        longer sees each other (attention, GroupNorm). Source: diffusers' `tiled_decode`.
        """
        assert side > 0 and side % TILE_UNIT == 0, f"{side} latents are no tile"
        overlap = side // 4
        kept, blended = (side - overlap) * self.scale_factor, overlap * self.scale_factor
        rows: list[Tensor] = []
        above: list[Tensor] = []
        for top in range(0, latents_BChw.shape[2], side - overlap):
            tiles: list[Tensor] = []
            for left in range(0, latents_BChw.shape[3], side - overlap):
                part = latents_BChw[:, :, top : top + side, left : left + side]
                tile = self.unclamped(part)
                if above:
                    blend(above[len(tiles)], tile, blended, dim=2)
                if tiles:
                    blend(tiles[-1], tile, blended, dim=3)
                tiles.append(tile)
            rows.append(torch.cat([tile[:, :, :kept, :kept] for tile in tiles], dim=3))
            above = tiles
        return torch.cat(rows, dim=2).clamp_(0.0, 1.0)

    def unclamped(self, latents_BChw: Tensor) -> Tensor:
        """Return images_B3HW fp32 of the caller's own, about 0 to 1."""
        z_BhwC = (latents_BChw / self.scaling + self.shift).to(self.dtype).movedim(1, -1)
        images_BHW3 = self.decoder(z_BhwC.contiguous())
        return images_BHW3.movedim(-1, 1).float() * 0.5 + 0.5

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Return normalised latents_BChw fp32 (the posterior's mean) for images_B3HW in [0, 1]."""
        x_B3HW = (images_B3HW * 2.0 - 1.0).to(self.dtype)
        mean_BChw = self.model.encode(
            x_B3HW.contiguous(memory_format=torch.channels_last)
        ).latent_dist.mode()
        return (mean_BChw.float() - self.shift) * self.scaling


def tile_side(vae: VAE, limit: int) -> int:
    """Return how many latents a side the largest tile of at most `limit` pixels has."""
    return max(1, math.isqrt(limit) // vae.scale_factor // TILE_UNIT) * TILE_UNIT


def blend(before: Tensor, after: Tensor, extent: int, *, dim: int) -> None:
    """Let the first `extent` of `after` along `dim` begin as the last of `before`, in place."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    shape = [1, 1, 1, 1]
    shape[dim] = extent
    weight = (torch.arange(extent, device=after.device) / extent).view(shape)
    first = after.narrow(dim, 0, extent)
    last = before.narrow(dim, before.shape[dim] - extent, extent)
    first.copy_(torch.lerp(last, first, weight))


class Decoder:
    """The decoder of an AutoencoderKL over `Ops`, on images channels last.

    Every GroupNorm and SiLU goes into the convolution behind it, every residual and upsampling into
    the convolution of its block. Source: diffusers' `Decoder`, whose weights it shares.
    """

    def __init__(self, model: Any, post_quant_conv: nn.Module | None, ops: Ops) -> None:
        """`model` is an `AutoencoderKL.decoder`; its weights are read at every call."""
        self.ops = ops
        mid, steps = model.mid_block, []
        if post_quant_conv is not None:
            steps.append(self._conv(post_quant_conv))
        steps += [self._conv(model.conv_in), self._resnet(mid.resnets[0])]
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            if attention is not None:
                steps.append(self._attention(attention))
            steps.append(self._resnet(resnet))
        for block in model.up_blocks:
            steps += [self._resnet(resnet) for resnet in block.resnets]
            steps += [self._conv(up.conv, upsample=True) for up in block.upsamplers or ()]
        steps.append(self._conv(model.conv_out, model.conv_norm_out))
        self.steps: list[Callable[[Tensor], Tensor]] = steps
        modules = [model] if post_quant_conv is None else [post_quant_conv, model]
        self.sources: list[Tensor] = [w for module in modules for w in module.parameters()]
        self.recorded = ops.record(self._decode, self.sources)

    def __call__(self, z_BhwC: Tensor) -> Tensor:
        """Return images_BHW3 in the model's range, about -1 to 1."""
        # A recording keeps its activations, and calling costs a large batch nothing.
        return (self.recorded if z_BhwC.numel() <= _MAX_RECORDED else self._decode)(z_BhwC)

    def _decode(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x

    def _conv(
        self, conv: Any, norm: Any = None, *, upsample: bool = False
    ) -> Callable[..., Tensor]:
        act = None if norm is None else GroupNorm(norm.weight, norm.bias, norm.num_groups, norm.eps)
        sources = [conv.weight]
        return self.ops.pack_conv(conv.weight, conv.bias, sources, norm=act, upsample=upsample)

    def _resnet(self, resnet: Any) -> Callable[[Tensor], Tensor]:
        """x' + W2 act(W1 act(x)), x' = x or, where the width changes, a 1 x 1 convolution of it."""
        first = self._conv(resnet.conv1, resnet.norm1)
        second = self._conv(resnet.conv2, resnet.norm2)
        shortcut = None if resnet.conv_shortcut is None else self._conv(resnet.conv_shortcut)

        def step(x_BHWO: Tensor) -> Tensor:
            kept = x_BHWO if shortcut is None else shortcut(x_BHWO)
            return second(first(x_BHWO), kept)

        return step

    def _attention(self, attention: Any) -> Callable[[Tensor], Tensor]:
        """x + W_o softmax(q k^T / sqrt(O)) v: one head over all pixels."""
        norm = attention.group_norm

        def step(x_BHWO: Tensor) -> Tensor:
            b, h, w, o = x_BHWO.shape
            y_BOHW = F.group_norm(
                x_BHWO.movedim(-1, 1), norm.num_groups, norm.weight, norm.bias, norm.eps
            )
            y_BPO = y_BOHW.movedim(1, -1).reshape(b, h * w, o)
            q, k, v = (m(y_BPO)[:, None] for m in (attention.to_q, attention.to_k, attention.to_v))
            y_BPO = F.scaled_dot_product_attention(q, k, v)[:, 0]
            return x_BHWO + attention.to_out[0](y_BPO).reshape(b, h, w, o)

        return step


def load_vae(root: Path, *, device: torch.device, dtype: torch.dtype, backend: str = "auto") -> VAE:
    """Load `root/vae`, strictly. Raises LoadError when it is missing, unreadable or incomplete."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from safetensors import SafetensorError

    folder = root / "vae"
    if not (folder / "config.json").is_file():
        raise LoadError(f"{root} has no vae/config.json")
    try:
        model, report = AutoencoderKL.from_pretrained(
            folder, torch_dtype=dtype, output_loading_info=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LoadError(f"cannot load {folder}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise LoadError(f"{folder} lacks {len(missing)} tensors, among them {missing[:3]}")
    for name, known in {"act_fn": "silu", "up_block_types": "UpDecoderBlock2D"}.items():
        value = model.config[name]
        if set([value] if isinstance(value, str) else value) != {known}:
            raise LoadError(f"{folder / 'config.json'}: {name} is {value!r}; supported: {known}")
    return VAE(model.to(device), backend=backend)
