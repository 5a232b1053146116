"""Decoding against diffusers' AutoencoderKL on random weights."""

import pytest
import torch

from tdm_r1.vae import VAE
from tests.tiny import randomise


def autoencoder(**overrides):
    from diffusers import AutoencoderKL

    options = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "latent_channels": 16, "scaling_factor": 1.5, "shift_factor": 0.06,
        "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False,
    }  # fmt: skip
    return randomise(AutoencoderKL(**{**options, **overrides}), seed=1).eval()


CONFIGS = {
    "plain": {},
    "attention": {"mid_block_add_attention": True, "layers_per_block": 2},
    "one block": {
        "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",),
        "block_out_channels": (8,), "use_quant_conv": True, "use_post_quant_conv": True,
        "shift_factor": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 5, 7), (16, 8, 8)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_decode_is_that_of_diffusers(config, size, backend):
    model = autoencoder(**config)
    vae = VAE(model, backend=backend)
    b, h, w = size
    z_BChw = torch.randn(b, 16, h, w, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = model.decode(z_BChw / vae.scaling + vae.shift, return_dict=False)[0]
        expected = (raw * 0.5 + 0.5).clamp(0, 1)
        assert expected.std() > 0.05
        for _ in range(2):  # the first call records, the second replays
            torch.testing.assert_close(vae.decode(z_BChw), expected, rtol=0, atol=5e-6)


def test_decode_follows_its_weights():
    vae = VAE(autoencoder())
    z_BChw = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = vae.decode(z_BChw)
        vae.model.decoder.up_blocks[0].resnets[0].norm1.bias += 1.0
        vae.model.decoder.up_blocks[0].resnets[0].conv1.weight *= 1.5
        raw = vae.model.decode(z_BChw / vae.scaling + vae.shift, return_dict=False)[0]
        after = vae.decode(z_BChw)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, (raw * 0.5 + 0.5).clamp(0, 1), rtol=0, atol=5e-6)
