"""Where Z-Image's tokens stand: padding of captions and images, positions and rotations.

Shapes: B batch, P caption tokens padded to a multiple of 32, I image tokens likewise, T any tokens,
H head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdm_r1.errors import ConfigError
from tdm_r1.models.conditioning import Condition

if TYPE_CHECKING:
    from tdm_r1.models.zimage import ZImageConfig

# Both token streams are padded with learned tokens, which take part in attention, to this multiple.
PAD_MULTIPLE = 32


def padded_lengths(cond: Condition, config: ZImageConfig) -> list[int]:
    """Return each caption's length rounded up to the pad multiple, checked against the model."""
    width, available = cond.tokens_BTE.shape[-1], cond.tokens_BTE.shape[1]
    if width != config.cap_feat_dim:
        raise ConfigError(f"text features are {width} wide, this model takes {config.cap_feat_dim}")
    lengths = cond.lengths_B.tolist()
    if min(lengths) < 1 or max(lengths) > available:
        raise ConfigError(f"caption lengths {lengths} must be between 1 and {available}")
    padded = [ceil_to_multiple(length) for length in lengths]
    # Caption rows are at frames 1..P and the image at frame P + 1.
    if max(padded) + 1 >= config.axes_lens[0]:
        limit = (config.axes_lens[0] - 2) // PAD_MULTIPLE * PAD_MULTIPLE
        raise ConfigError(f"caption of {max(lengths)} tokens exceeds this model's maximum {limit}")
    return padded


def ceil_to_multiple(length: int) -> int:
    """Round up to the pad multiple."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def position_ids(
    padded: list[int], rows: int, cols: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (frame, row, column) of caption rows [1, P, 3] and of image rows [B, I, 3].

    Caption row j is (1 + j, 0, 0); image row (y, x) is (P_b + 1, y, x); image pads are (0, 0, 0).
    """
    text = torch.zeros(1, max(padded), 3, dtype=torch.int64, device=device)
    text[0, :, 0] = torch.arange(1, max(padded) + 1, device=device)
    num_image = rows * cols
    image = torch.zeros(
        len(padded), ceil_to_multiple(num_image), 3, dtype=torch.int64, device=device
    )
    index = torch.arange(num_image, device=device)
    image[:, :num_image, 0] = torch.tensor(padded, device=device)[:, None] + 1
    image[:, :num_image, 1] = index // cols
    image[:, :num_image, 2] = index % cols
    return text, image


def rope_table(ids_BT3: Tensor, config: ZImageConfig) -> Tensor:
    """Return the rotations [B, T, 1, H], fp32, that `qk_norm_rope` takes.

    Axis a of width d_a turns pair i by position_a * theta^(-2 i / d_a); the axes lie side by side.
    """
    angles = []
    for axis, dim in enumerate(config.axes_dims):
        # The published table is made in fp64 and rounded once: the angle, not the frequency.
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=ids_BT3.device) / dim
        frequency = 1.0 / config.rope_theta**exponent
        angles.append((ids_BT3[..., axis, None] * frequency).float())
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(-2)[..., None, :]
