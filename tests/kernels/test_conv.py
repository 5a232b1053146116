"""Convolutions in C++ against the library's in fp64: values, layouts, edges, and who declines."""

import pytest
import torch
from diffusers import AutoencoderKL
from tdm_kernels import conv, native, recording, reference
from tdm_kernels.reference import GroupNorm

from tdm_r1.vae import VAE
from tests.kernels.compare import assert_as_good, randn

pytestmark = [
    pytest.mark.skipif(bool(native.load()), reason=f"the native library {native.load()}"),
    pytest.mark.usefixtures("instruction_set"),
]

# (B, H, W), C, O: whole panels and odd ones, rows shorter than a register's worth of pixels.
SHAPES = [((1, 8, 8), 16, 64), ((2, 5, 7), 6, 5), ((3, 1, 1), 4, 17), ((1, 4, 37), 24, 3)]


def group_norm(channels: int, seed: int, groups: int = 2) -> GroupNorm:
    return GroupNorm(randn(channels, seed=seed), randn(channels, seed=seed + 1), groups, 1e-6)


def packed(module, weight, bias, norm, upsample, double=False):
    if double:
        weight, bias = weight.double(), None if bias is None else bias.double()
        norm = None if norm is None else GroupNorm(norm[0].double(), norm[1].double(), *norm[2:])
    return module.pack_conv(weight, bias, [weight], norm=norm, upsample=upsample)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("kernel", "upsample"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize(("size", "c", "o"), SHAPES)
def test_values(size, c, o, kernel, upsample, normed):
    x = randn(*size, c, seed=1) * 2 + 0.5
    weight = randn(o, c, kernel, kernel, seed=2)
    bias = randn(o, seed=3) if normed else None
    norm = group_norm(c, 4) if normed else None
    b, h, w = size
    times = 2 if upsample else 1
    residual = randn(b, times * h, times * w, o, seed=6) if normed else None
    found, like = (packed(m, weight, bias, norm, upsample) for m in (conv, reference))
    assert isinstance(found, conv.PanelConv)
    exact = packed(reference, weight, bias, norm, upsample, double=True)
    expected = exact(x.double(), None if residual is None else residual.double())
    assert_as_good(found(x, residual), like(x, residual), expected)


def test_any_strides_are_read():
    x = randn(2, 8, 12, 6, seed=1)
    weight = randn(9, 8, 3, 3, seed=2).contiguous(memory_format=torch.channels_last)
    layer = conv.pack_conv(weight, None, [weight])
    view = x.permute(0, 3, 2, 1)  # [2, 6, 12, 8]
    assert torch.equal(layer(view), layer(view.contiguous()))


def test_panels_follow_an_update_in_place():
    x, weight = randn(1, 4, 4, 8, seed=1), randn(8, 8, 3, 3, seed=2)
    layer = conv.pack_conv(weight, None, [weight])
    assert layer(x).abs().max() > 0
    weight.zero_()
    assert layer(x).abs().max() == 0


@pytest.mark.parametrize("upsample", [False, True])
def test_panels_stay_where_a_recording_reads_them(upsample):
    x, weight = randn(1, 4, 4, 8, seed=1), randn(16, 8, 3, 3, seed=2)
    layer = conv.pack_conv(weight, None, [weight], upsample=upsample)
    with torch.inference_mode():
        layer(x)
    before = layer.panels.data_ptr()
    for seed in (3, 4):
        weight.copy_(randn(16, 8, 3, 3, seed=seed))
        expected = packed(reference, weight, None, None, upsample, double=True)(x.double())
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
        assert layer.panels.data_ptr() == before


def test_a_decoder_is_recorded_anew_where_its_first_convolution_changes():
    model = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",), down_block_types=("DownEncoderBlock2D",),
        mid_block_add_attention=False,
    ).eval()  # fmt: skip
    vae, z_BChw = VAE(model), randn(1, 4, 4, 4, seed=1)
    with torch.no_grad():
        vae.decode(z_BChw)
        assert None not in vae.decoder.recorded.programs.values()
        model.post_quant_conv.weight.mul_(-2)
        raw = model.decode(z_BChw / vae.scaling + vae.shift, return_dict=False)[0]
        expected = (raw * 0.5 + 0.5).clamp(0, 1)
        torch.testing.assert_close(vae.decode(z_BChw), expected, rtol=0, atol=5e-6)


def test_a_recording_is_the_calls():
    norm, weight = group_norm(16, 1, groups=4), randn(16, 16, 3, 3, seed=3)
    first = conv.pack_conv(weight, randn(16, seed=4), [weight], norm=norm)
    second = conv.pack_conv(weight, None, [weight], upsample=True)
    with torch.no_grad():
        recorded = recording.record(lambda x: second(first(x, x)), [weight])
        for seed in (5, 6):
            x = randn(2, 9, 8, 16, seed=seed)
            assert torch.equal(recorded(x), second(first(x, x)))
        assert next(iter(recorded.programs.values())) is not None


def test_what_the_library_keeps():
    def own(*shape, dtype=torch.float32, upsample=False):
        weight = randn(*shape, seed=1, dtype=dtype)
        return isinstance(conv.pack_conv(weight, None, [], upsample=upsample), conv.PanelConv)

    assert own(64, 64, 3, 3) and own(64, 64, 1, 1) and own(256, 256, 3, 3, upsample=True)
    assert not own(256, 256, 3, 3)
    assert not own(8, 8, 5, 5) and not own(8, 8, 1, 1, upsample=True)
    assert not own(8, 8, 3, 3, dtype=torch.bfloat16)
    x, weight = randn(1, 4, 4, 8, seed=1), randn(8, 8, 3, 3, seed=2)
    layer = conv.pack_conv(weight, None, [weight])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    x.requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).sum(), x)
    assert slope.shape == x.shape


def test_the_kernel_refuses_what_it_cannot_read():
    x, out, panels = torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 16), torch.zeros(16 * 8 * 9)
    run = native.native_op("conv")
    run(x, None, None, panels, None, None, 3, False, out)
    for arguments, message in (
        ((x, None, None, panels, None, None, 5, False, out), "1 or 3"),
        ((x, None, None, panels[:-1], None, None, 3, False, out), "panels must be 1152"),
        ((x, None, None, panels, None, None, 3, False, out[:, :3]), "out must be"),
        ((x.double(), None, None, panels, None, None, 3, False, out), "float32"),
        ((x, torch.zeros(8), None, panels, None, None, 3, False, out), "come together"),
        ((x, None, None, panels, None, None, 1, True, out), "upsampling"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*arguments)
    with pytest.raises(RuntimeError, match="3 groups do not divide 8"):
        native.native_op("group_affine")(
            x, torch.zeros(8), torch.zeros(8), 3, 1e-6, torch.zeros(1, 8), torch.zeros(1, 8)
        )
