"""Write an untrained tiny model: a whole diffusers-format directory around a trained autoencoder.

    python -m tdm_r1.assets.build tiny-sd3|tiny-zimage --vae DIR --output DIR [--seed 0]

The text encoders are of the real classes and stay random: their vocabulary is smaller than their
width, so the transformer's first linear layer can learn any embedding of the tokens. The
transformer starts with zero gates (adaLN-Zero, Peebles & Xie 2023); `method: sft` trains it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from . import vocabulary

SD3_TOKENS = 12  # of each text encoder: "a photo of a red circle and a blue square" and its markers


def random_(module: nn.Module, seed: int, gain: float = 0.7) -> nn.Module:
    """Redraw: embeddings N(0, 1), positions N(0, .5), matrices N(0, gain^2 / fan_in), biases 0.

    Norms stay as built.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "norm" in name:
                continue
            scale = gain * weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.0
            if "position" in name:
                scale = 0.5
            elif "embed" in name or "shared" in name:
                scale = 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return module.eval()


def init_transformer_(module: nn.Module, seed: int) -> nn.Module:
    """Xavier-uniform matrices, zero biases, zero modulation and zero output."""
    generator = torch.Generator().manual_seed(seed)
    zero = (
        "norm1.linear",
        "norm1_context.linear",
        "norm_out.linear",
        "proj_out",
        "adaLN_modulation",
    )
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "norm" in name and "linear" not in name:
                continue
            if weight.ndim < 2 or any(z in name for z in zero) or "all_final_layer" in name:
                weight.zero_() if "pad_token" not in name else weight.fill_(0.0)
            else:
                fan_out, fan_in = weight.shape[0], weight[0].numel()
                bound = (6.0 / (fan_in + fan_out)) ** 0.5
                weight.uniform_(-bound, bound, generator=generator)
    return module


def build_sd3(vae, seed: int):
    """StableDiffusion3Pipeline: SD3.5-like, 6 layers of width 192, two with dual attention."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import T5Config, T5EncoderModel

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=128,
        caption_projection_dim=192,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    clip, t5 = vocabulary.clip_tokenizer(SD3_TOKENS), vocabulary.t5_tokenizer(SD3_TOKENS)
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return StableDiffusion3Pipeline(
        transformer=init_transformer_(transformer, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_clip(clip, seed + 1),
        tokenizer=clip,
        text_encoder_2=_clip(clip, seed + 2),
        tokenizer_2=vocabulary.clip_tokenizer(SD3_TOKENS),
        text_encoder_3=random_(T5EncoderModel(t5_config), seed + 3),
        tokenizer_3=t5,
    )


def _clip(tokenizer, seed: int):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=64,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return random_(CLIPTextModelWithProjection(config), seed)


def build_zimage(vae, seed: int):
    """ZImagePipeline: 6 layers of width 192 and one refiner layer on either side."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = vocabulary.qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    )
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=192,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=192,
        rope_theta=256.0,
        axes_dims=[16, 24, 24],
        axes_lens=[512, 64, 64],
    )
    return ZImagePipeline(
        transformer=init_transformer_(transformer, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=random_(Qwen3Model(config), seed + 1),
        tokenizer=tokenizer,
    )


BUILDERS = {"tiny-sd3": build_sd3, "tiny-zimage": build_zimage}


def main(argv: list[str] | None = None) -> int:
    from diffusers import AutoencoderKL

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=sorted(BUILDERS))
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    pipeline = BUILDERS[args.name](AutoencoderKL.from_pretrained(args.vae), args.seed)
    for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        part = getattr(pipeline, name, None)
        if part is not None:
            print(name, f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M parameters")
            part.half()
    pipeline.save_pretrained(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
