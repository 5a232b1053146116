"""Random tiny models in diffusers' format, both families, for tests that need no shipped weights.

`make_sd3` and `make_zimage` write a directory that `StableDiffusion3Pipeline.from_pretrained` and
`ZImagePipeline.from_pretrained` read unchanged. Weights are drawn so that every parameter matters:
no zero gates, no unset pad tokens. Images are 64 x 64, latents 16 x 8 x 8.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tdm_r1.assets import vocabulary

WORDS = ("red", "green", "blue", "circle", "square", "two", "photo", "cat")


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter in place: matrices N(0, 1/fan_in), gains 1 + .1 N, the rest .1 N."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise + (1.0 if "norm" in name and "weight" in name else 0.0))
    return module.eval()


def clip_tokenizer(max_length: int = 16):
    """The shipped models' CLIP tokenizer over a smaller vocabulary."""
    return vocabulary.clip_tokenizer(max_length, WORDS)


def t5_tokenizer(max_length: int = 24):
    """The shipped models' T5 tokenizer over a smaller vocabulary."""
    return vocabulary.t5_tokenizer(max_length, WORDS)


def qwen_tokenizer():
    """The shipped models' Qwen tokenizer over a smaller vocabulary."""
    return vocabulary.qwen_tokenizer(words=WORDS)


def make_sd3(
    root: Path, seed: int = 0, *, solver: str = "euler", with_t5: bool = True, layers: int = 3
) -> Path:
    """Write a random StableDiffusion3Pipeline directory; `solver` picks its scheduler class.

    Of two `layers` and more the first has two attentions, and the last ends the text.
    """
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=layers,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=64, pooled_projection_dim=56, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    tokenizer_3, t5 = None, None
    if with_t5:
        tokenizer_3 = t5_tokenizer()
        t5 = randomise(
            T5EncoderModel(
                T5Config(
                    vocab_size=len(tokenizer_3), d_model=64, d_kv=16, d_ff=96,
                    num_layers=layers - 1, num_heads=4, feed_forward_proj="gated-gelu",
                    dropout_rate=0.0,
                )
            ),
            seed + 1,
        )  # fmt: skip
    tokenizers = [clip_tokenizer(), clip_tokenizer()]
    pipeline = StableDiffusion3Pipeline(
        transformer=randomise(transformer, seed),
        scheduler=_scheduler(solver),
        vae=_vae(seed + 2, scaling=1.5305, shift=0.0609),
        text_encoder=_clip(tokenizers[0], 32, seed + 3, layers),
        tokenizer=tokenizers[0],
        text_encoder_2=_clip(tokenizers[1], 24, seed + 4, layers),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5,
        tokenizer_3=tokenizer_3,
    )
    pipeline.save_pretrained(root)
    return Path(root)


def make_zimage(root: Path, seed: int = 0, *, layers: int = 3, heads: int = 4) -> Path:
    """Write a random ZImagePipeline directory; of 6 `heads` every width is a multiple of 16."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer()
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        )
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=16 * heads, n_layers=layers,
        n_refiner_layers=1, n_heads=heads, n_kv_heads=heads, cap_feat_dim=48, rope_theta=256.0,
        axes_dims=[4, 6, 6], axes_lens=[160, 64, 64],
    )  # fmt: skip
    pipeline = ZImagePipeline(
        transformer=randomise(transformer, seed),
        scheduler=_scheduler("euler"),
        vae=_vae(seed + 2, scaling=0.3611, shift=0.1159),
        text_encoder=randomise(text_encoder, seed + 1),
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(root)
    return Path(root)


def _clip(tokenizer, width: int, seed: int, layers: int):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=2, projection_dim=width,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return randomise(CLIPTextModelWithProjection(config), seed)


def _vae(seed: int, *, scaling: float, shift: float):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8,
        scaling_factor=scaling, shift_factor=shift,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return randomise(vae, seed)


def _scheduler(solver: str):
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        lower_order_final=True, final_sigmas_type="zero", use_flow_sigmas=True,
        prediction_type="flow_prediction", flow_shift=3.0,
    )  # fmt: skip
