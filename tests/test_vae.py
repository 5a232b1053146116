"""Decoding against diffusers' AutoencoderKL on random weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tdm_r1 import shapes
from tdm_r1.pipeline import load_pipeline
from tdm_r1.vae import VAE, tile_side
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


@pytest.mark.parametrize("size", [(16, 16), (21, 14), (9, 40)])
@pytest.mark.parametrize("config", [CONFIGS["attention"], CONFIGS["one block"]])
def test_tiles_are_those_of_diffusers(config, size):
    model = autoencoder(**config)
    vae = VAE(model)
    model.enable_tiling()
    model.tile_latent_min_size, model.tile_sample_min_size = 8, 8 * vae.scale_factor
    z_BChw = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = model.decode(z_BChw / vae.scaling + vae.shift, return_dict=False)[0]
        expected = (raw * 0.5 + 0.5).clamp(0, 1)
        found = vae.decode_tiled(z_BChw, 8)
    assert found.shape == (2, 3, *(n * vae.scale_factor for n in size))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_tiles_are_whole_where_nothing_overlaps_and_join_without_seams(monkeypatch):
    vae = VAE(autoencoder())  # 4 pixels a latent
    z_BChw = torch.randn(1, 16, 20, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, tile = vae.decode_tiled(z_BChw, 8), vae.decode(z_BChw[..., 6:14, 12:20])
    assert torch.equal(found[..., 32:48, 56:72], tile[..., 8:24, 8:24])
    # A decoder that looks at one latent alone draws the same with tiles and without.
    monkeypatch.setattr(
        vae, "unclamped", lambda z: F.interpolate(z[:, :3].sigmoid(), scale_factor=4)
    )
    torch.testing.assert_close(vae.decode_tiled(z_BChw, 8), vae.decode(z_BChw), rtol=0, atol=1e-6)


def test_tiles_of_a_picture_look_like_the_picture():
    vae = load_pipeline("tiny-sd3", device="cpu", dtype="float32").vae
    captions = ("two red circles", "a green square", "a blue triangle", "one yellow circle")
    rng = np.random.default_rng(1)
    images = [torch.tensor(shapes.render(caption, rng)) for caption in captions]
    rows = torch.cat([torch.cat(images[:2], dim=1), torch.cat(images[2:], dim=1)])
    with torch.no_grad():
        z_BChw = vae.encode(rows.permute(2, 0, 1)[None] / 255)
        error = vae.decode_tiled(z_BChw, 12) - vae.decode(z_BChw)
    assert 0 < error.abs().mean() < 0.02


@pytest.mark.parametrize(("limit", "side"), [(1023, 4), (1024, 4), (64 * 64, 8), (65 * 95, 8)])
def test_tiles_are_as_large_as_the_limit_allows(limit, side):
    assert tile_side(SimpleNamespace(scale_factor=8), limit) == side


@torch.no_grad()
def test_encoding_is_the_models_mean_normalised():
    model = autoencoder()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean = model.encode(images * 2 - 1).latent_dist.mean
    expected = (mean - model.config.shift_factor) * model.config.scaling_factor
    torch.testing.assert_close(VAE(model).encode(images), expected, rtol=0, atol=1e-5)
