"""The published transformers this code base is for, by Hub id: their configurations."""

from __future__ import annotations

from typing import Any

from tdm_r1.models.sd3 import SD3Config
from tdm_r1.models.zimage import ZImageConfig

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
ZIMAGE_TURBO = "Tongyi-MAI/Z-Image-Turbo"
CONFIGS: dict[str, Any] = {
    SD35_MEDIUM: SD3Config(
        sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    ),
    ZIMAGE_TURBO: ZImageConfig(axes_lens=(1536, 512, 512)),
}  # fmt: skip
