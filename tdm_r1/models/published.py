"""The published models this code base is for, by Hub id: their configurations."""

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
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
# By model: transformers' class and configuration of every text encoder, in the order of folders.
TEXT_ENCODERS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    SD35_MEDIUM: (
        ("CLIPTextModelWithProjection", {
            **_CLIP, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu",
        }),
        ("CLIPTextModelWithProjection", {
            **_CLIP, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
            "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
        }),
        ("T5EncoderModel", {
            "vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64,
            "num_layers": 24, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False,
        }),
    ),
    ZIMAGE_TURBO: (
        ("Qwen3Model", {
            "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "rope_theta": 1e6,
        }),
    ),
}  # fmt: skip
# Of both: diffusers' AutoencoderKL.
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
    "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
