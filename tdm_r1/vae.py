"""Latents <-> images through diffusers' AutoencoderKL, the scaling included.

Shapes: B images, C latent channels, h w latent size, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tdm_r1.errors import LoadError


class VAE:
    """An AutoencoderKL that speaks normalised latents and images in [0, 1].

    Normalised: (z - shift_factor) * scaling_factor, what the diffusion model sees.
    """

    def __init__(self, model, *, memory_format: torch.memory_format = torch.channels_last) -> None:
        """`model` is an AutoencoderKL; channels last spares every convolution two re-layouts."""
        self.model = model.eval().requires_grad_(False).to(memory_format=memory_format)
        self.memory_format = memory_format
        config = model.config
        self.scaling = config.scaling_factor
        self.shift = config.shift_factor or 0.0
        self.latent_channels = config.latent_channels
        self.scale_factor = 2 ** (len(config.block_out_channels) - 1)
        self.sample_size = config.sample_size

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Return images_B3HW fp32 in [0, 1]: D(latents_BChw / scaling + shift)."""
        z_BChw = (latents_BChw / self.scaling + self.shift).to(self.model.dtype)
        images_B3HW = self.model.decode(
            z_BChw.contiguous(memory_format=self.memory_format), return_dict=False
        )[0]
        return (images_B3HW.float() * 0.5 + 0.5).clamp_(0.0, 1.0)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Return normalised latents_BChw fp32 (the posterior's mean) for images_B3HW in [0, 1]."""
        x_B3HW = (images_B3HW * 2.0 - 1.0).to(self.model.dtype)
        mean_BChw = self.model.encode(
            x_B3HW.contiguous(memory_format=self.memory_format)
        ).latent_dist.mode()
        return (mean_BChw.float() - self.shift) * self.scaling


def load_vae(root: Path, *, device: torch.device, dtype: torch.dtype) -> VAE:
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
    return VAE(model.to(device))
