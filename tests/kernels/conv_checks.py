"""GroupNorm and SiLU in Triton, and what `pack_conv` makes of them. Run by test_triton.py."""

from __future__ import annotations

import pytest
import torch
from tdm_kernels import group_norm, reference
from tdm_kernels.reference import GroupNorm

from tests.kernels.compare import assert_as_good
from tests.kernels.triton_checks import (  # noqa: F401
    DTYPES,
    HALF,
    INTERPRETED,
    inside_nan,
    poisoned_buffers,
    randn,
)

# B, H, W, C, G: one pixel, a slice and a bit, odd groups; whole slices of a decoder's width.
IMAGES = [(2, 1, 1, 8, 2), (3, 5, 7, 24, 4), (1, 9, 11, 12, 4), (1, 8, 8, 128, 32)]
if not INTERPRETED:
    IMAGES += [(2, 64, 64, 512, 32), (1, 513, 301, 128, 32)]


def group_norm_of(channels, groups, *, dtype=torch.float32):
    weight, bias = randn(2, channels, seed=2, dtype=dtype).unbind()
    return GroupNorm(weight, bias, groups, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "h", "w", "c", "groups"), IMAGES)
def test_a_convolution_after_group_norm(b, h, w, c, groups, dtype, monkeypatch):
    # In TF32 the library's choice of an algorithm, which the layout decides, would be the error.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x = inside_nan(randn(b, h, w, c, seed=1, dtype=dtype) * 2 + 0.5)
    norm_ = group_norm_of(c, groups, dtype=dtype)
    weight, bias = randn(5, c, 3, 3, seed=3, dtype=dtype) / (3 * c**0.5), None
    residual = randn(b, h, w, 5, seed=4, dtype=dtype)

    def made(module, double=False):
        cast = torch.Tensor.double if double else torch.Tensor.clone
        ours = GroupNorm(cast(norm_.weight_C), cast(norm_.bias_C), *norm_[2:])
        layer = module.pack_conv(cast(weight), bias, [weight], norm=ours)
        return layer(cast(x), cast(residual))

    assert_as_good(made(group_norm), made(reference), made(reference, double=True))


def test_group_norm_of_a_large_mean_and_of_a_constant():
    x = randn(1, 9, 9, 16, seed=1) + 3000.0
    norm_ = group_norm_of(16, 4)
    found = group_norm.group_norm_silu(x, norm_).double()
    rows = x.double().movedim(-1, 1)
    y = torch.nn.functional.group_norm(
        rows, 4, norm_.weight_C.double(), norm_.bias_C.double(), norm_.eps
    )
    exact = torch.nn.functional.silu(y).movedim(1, -1)
    assert (found - exact).abs().max() < 5e-4  # an ulp of the mean is 2.4e-4
    for constant in (0.7, 3000.0):
        flat = group_norm.group_norm_silu(torch.full_like(x, constant), norm_)
        torch.testing.assert_close(flat, torch.nn.functional.silu(norm_.bias_C).expand_as(flat))


@pytest.mark.parametrize("groups", [1, 4])
def test_wide_groups_are_joined_from_fewer_slices(groups, monkeypatch):
    monkeypatch.setattr(group_norm, "MAX_JOINED", 32)
    x, norm_ = randn(1, 11, 12, 16, seed=1), group_norm_of(16, groups)  # four slices of 32 before
    found = group_norm.group_norm_silu(x, norm_)
    like = torch.nn.functional.group_norm(
        x.movedim(-1, 1), groups, norm_.weight_C, norm_.bias_C, norm_.eps
    )
    torch.testing.assert_close(found, torch.nn.functional.silu(like).movedim(1, -1))


def test_a_picture_is_the_same_bits_in_any_batch():
    x, norm_ = randn(3, 9, 9, 16, seed=1, dtype=HALF), group_norm_of(16, 4)
    alone = [group_norm.group_norm_silu(image[None], norm_) for image in x]
    assert torch.equal(group_norm.group_norm_silu(x, norm_), torch.cat(alone))


def test_a_convolution_that_trains_is_the_references():
    x, weight = randn(1, 4, 4, 8, seed=1), randn(3, 8, 3, 3, seed=3).requires_grad_()
    layer = group_norm.pack_conv(weight, None, [weight], norm=group_norm_of(8, 2))
    like = reference.pack_conv(weight, None, [weight], norm=group_norm_of(8, 2))
    for found in (layer, like):
        found(x).square().sum().backward()
    found, weight.grad = weight.grad / 2, None
    like(x).square().sum().backward()
    torch.testing.assert_close(found, weight.grad)


def test_refuses_what_the_kernels_cannot_read():
    x, norm = randn(2, 5, 3, 24, seed=1), group_norm_of(24, 4)
    for call, message in (
        (lambda: group_norm.group_norm_silu(x[0], norm), "x must have 4 axes"),
        (lambda: group_norm.group_norm_silu(x.double(), norm), "x must be float32"),
        (lambda: group_norm.group_norm_silu(x, group_norm_of(24, 5)), "24 channels are no 5"),
        (lambda: group_norm.group_norm_silu(x, group_norm_of(16, 4)), r"weight must be \(24,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert group_norm.group_norm_silu(x[:0], norm).shape == (0, 5, 3, 24)
