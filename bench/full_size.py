"""Z-Image and SD3.5-Medium at full size with random weights, ours and diffusers', made on a device.

Latency does not depend on the values of weights. Shapes: B images, T text tokens, n image tokens.
`tiny` models have the same parts and a thousandth of the size: they test the benchmark itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from bench.count import SD35M, ZIMAGE
from tdm_r1 import flow
from tdm_r1.engine import Engine
from tdm_r1.graphs import Backend
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.sd3 import SD3Transformer
from tdm_r1.models.zimage import ZImageTransformer
from tdm_r1.pipeline import Pipeline
from tdm_r1.text import ClipFeatures, QwenFeatures, T5Features
from tdm_r1.vae import VAE

FAMILIES = ("zimage", "sd35m")
# tokens of CLIP, and of T5 at 512 and 1024 pixels
CLIP_TOKENS, T5_TOKENS, CAPTION = 77, {512: 128, 1024: 256}, 128
ZIMAGE_TINY = replace(
    ZIMAGE, dim=192, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=64,
    axes_dims=(16, 24, 24),
)  # fmt: skip
SD35M_TINY = replace(
    SD35M, num_layers=2, num_attention_heads=2, attention_head_dim=32, caption_projection_dim=64,
    joint_attention_dim=64, pooled_projection_dim=32, dual_attention_layers=(0,),
    pos_embed_max_size=16, sample_size=16,
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One model: diffusers' modules and our pipeline, over equal weights."""

    family: str
    config: Any
    transformer: Any
    vae: Any
    encode_peer: Callable[[int], tuple[Tensor, Tensor | None]]
    pipeline: Pipeline
    schedule: flow.Schedule

    def engine(self, graphs: str | Backend) -> Engine:
        """Our engine on the subject's schedule."""
        return Engine(self.pipeline, solver=self.schedule.solver, graphs=graphs)

    def quantized(self) -> Subject:
        """The same with every layer of our transformer in fp8 alone."""
        ours = copy.deepcopy(self.pipeline.transformer)
        ours.quantize(list(ours.layers_by_name()))
        ours.release()
        return replace(self, pipeline=replace(self.pipeline, transformer=ours))

    def compiled(self, mode: str) -> Any:
        """diffusers' module over the same weights, its blocks compiled when first called.

        Block by block, as diffusers advises: as one piece, 30 equal blocks are compiled 30 times.
        """
        # Blocks share their code: without this the ninth kind or shape would run eager, unsaid.
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        shared = {id(parameter): parameter for parameter in self.transformer.parameters()}
        model = copy.deepcopy(self.transformer, memo=shared)
        for name in ("layers", "noise_refiner", "context_refiner", "transformer_blocks"):
            for block in getattr(model, name, ()):
                block.compile(mode=mode, dynamic=False)
        return model

    def sample_peer(self, model: Any, text: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
        """Final latents by diffusers' module: our steps, none of its pipeline's checks."""
        tokens, pooled = text
        dtype, m = tokens.dtype, None
        for k, t in enumerate(self.schedule.timesteps):
            t_B = torch.full((len(x),), t, device=x.device)
            if self.family == "zimage":
                images = list(x.to(dtype)[:, :, None].unbind())
                out = model(images, (1000 - t_B) / 1000, [tokens[0]] * len(x), return_dict=False)
                v = -torch.stack([image.float() for image in out[0]])[:, :, 0]
            else:
                rows = (y.expand(len(x), *y.shape[1:]) for y in (tokens, pooled))
                v = model(x.to(dtype), *rows, t_B, return_dict=False)[0].float()
            x, m = self.schedule.step(k, x, v, m)
        return x

    def decode_peer(self, x: Tensor) -> Tensor:
        """uint8 pixels by diffusers' autoencoder."""
        config = self.vae.config
        z = (x / config.scaling_factor + config.shift_factor).to(self.vae.dtype)
        images = self.vae.decode(z, return_dict=False)[0].float() * 0.5 + 0.5
        return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def flops(self, size: int, batch: int) -> dict[str, float]:
        """Operations of one trajectory in products and in attention, context not counted."""
        n = (size // (self.pipeline.vae.scale_factor * self.config.patch_size)) ** 2
        t = self.num_text(size)
        steps = self.schedule.num_steps * batch
        if self.family == "zimage":
            d, layers, refiners = (
                self.config.dim,
                self.config.n_layers,
                self.config.n_refiner_layers,
            )
            per_token = 2 * (4 * d * d + 3 * d * int(d / 3 * 8))
            products = per_token * ((n + t) * layers + n * refiners)
            attention = 4 * d * ((n + t) ** 2 * layers + n * n * refiners)
        else:
            d, layers = self.config.dim, self.config.num_layers
            dual = len(self.config.dual_attention_layers)
            products = 2 * d * d * (12 * layers * n + 4 * dual * n + 12 * (layers - 1) * t + 3 * t)
            attention = 4 * d * ((n + t) ** 2 * layers + n * n * dual)
        return {"products": products * steps, "attention": attention * steps}

    def num_text(self, size: int) -> int:
        """Text tokens that the transformer reads for a picture of this size."""
        return self.pipeline.text.num_tokens(size)  # type: ignore[attr-defined]


class RandomText:
    """The encoders on random ids, a new prompt at every call: what `Engine` takes for its text."""

    def __init__(self, device: torch.device, encode: Callable[[int], tuple], family: str) -> None:
        self.device, self.run, self.family, self.size = device, encode, family, 512

    def num_tokens(self, size: int) -> int:
        """T at a picture's size."""
        return CAPTION if self.family == "zimage" else CLIP_TOKENS + T5_TOKENS[max(size, 512)]

    def clear_cache(self) -> None:
        """There is none."""

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        """Features of as many prompts; `size` says for pictures of how many pixels a side."""
        tokens, pooled = self.run(self.size)
        tokens = tokens.expand(len(prompts), -1, -1)
        lengths = torch.full((len(prompts),), tokens.shape[1], device=self.device)
        pooled = None if pooled is None else pooled.expand(len(prompts), -1)
        return Condition(tokens, lengths, pooled)


def make(family: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> Subject:
    """Build one subject; about 20 GB (Z-Image, twice its transformer) or 25 (SD3.5, with T5)."""
    import diffusers

    zimage = family == "zimage"
    if zimage:
        config: Any = ZIMAGE_TINY if tiny else ZIMAGE
        kwargs = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
        kwargs["all_patch_size"], kwargs["all_f_patch_size"] = (2,), (1,)
        kwargs.pop("siglip_feat_dim")
        peer = made(lambda: diffusers.ZImageTransformer2DModel(**kwargs), device, dtype)
        encode, encode_peer = _qwen(device, dtype, config.cap_feat_dim, tiny)
    else:
        config = SD35M_TINY if tiny else SD35M
        peer = made(lambda: diffusers.SD3Transformer2DModel(**asdict(config)), device, dtype)
        encode = encode_peer = _clip_and_t5(device, dtype, config, tiny)
    with torch.device("meta"):
        ours: Any = (ZImageTransformer if zimage else SD3Transformer)(config)
    ours.load_state_dict(peer.state_dict(), assign=True)
    vae = made(lambda: _autoencoder(zimage, tiny), device, dtype)
    pipeline = Pipeline(
        family="zimage" if zimage else "sd3",
        transformer=ours.freeze(),
        text=RandomText(device, encode, family),  # type: ignore[arg-type]
        vae=VAE(copy.deepcopy(vae)),
        shift=3.0,
        default_solver="euler" if zimage else "dpm2m",
        default_size=1024,
        name=f"{family} with random weights",
        path=Path(),
    )
    schedule = flow.schedule(pipeline.default_solver, 4, 3.0)
    return Subject(family, config, peer, vae, encode_peer, pipeline, schedule)


def made(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """Build a module right where it will live, its uninitialised parameters drawn."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = build()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("pad_token"):  # torch.empty
                parameter.normal_(std=0.02)
    return nn.Module.to(module, dtype).eval().requires_grad_(False)


def _autoencoder(zimage: bool, tiny: bool) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32) if tiny else (128, 256, 512, 512),
        layers_per_block=1 if tiny else 2, norm_num_groups=8 if tiny else 32,
        sample_size=1024, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=0.3611 if zimage else 1.5305, shift_factor=0.1159 if zimage else 0.0609,
    )  # fmt: skip


def _qwen(device: torch.device, dtype: torch.dtype, width: int, tiny: bool) -> tuple[Any, Any]:
    """Ours: the real tokens, without the last layer. Theirs: 512 tokens and every layer."""
    from transformers import Qwen3Config, Qwen3Model

    sizes = {"num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100}
    if not tiny:
        sizes = {"num_hidden_layers": 36, "intermediate_size": 9728, "num_attention_heads": 32}
        sizes |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    config = Qwen3Config(hidden_size=width, rope_theta=1e6, **sizes)
    model = made(lambda: Qwen3Model(config), device, dtype)
    shared = {id(parameter): parameter for parameter in model.parameters()}
    ours = QwenFeatures(copy.deepcopy(model, memo=shared))
    ids = torch.randint(sizes["vocab_size"], (1, 512), device=device)
    mask = (torch.arange(512, device=device) < CAPTION)[None].long()

    def encode(_size: int) -> tuple[Tensor, None]:
        return ours(ids[:, :CAPTION]), None

    def encode_peer(_size: int) -> tuple[Tensor, None]:
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return out.hidden_states[-2][:, :CAPTION], None

    return encode, encode_peer


def _clip_and_t5(device: torch.device, dtype: torch.dtype, config: Any, tiny: bool) -> Any:
    """Both sides run the same: all tokens of both CLIP encoders and of T5."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    width, pooled = config.joint_attention_dim, config.pooled_projection_dim
    clips = [(pooled // 2, 2, 2, 4), (pooled // 2, 2, 2, 4)]
    t5 = {"d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    if not tiny:
        clips = [(768, 12, 12, 4), (1280, 32, 20, 4)]
        t5 = {"d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    encoders = []
    for side, layers, heads, times in clips:
        settings = CLIPTextConfig(
            hidden_size=side, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=times * side, projection_dim=side, vocab_size=100,
            bos_token_id=98, eos_token_id=99,
        )  # fmt: skip
        model = made(lambda s=settings: CLIPTextModelWithProjection(s), device, dtype)
        encoders.append(ClipFeatures(model))
    gated = T5Config(d_model=width, feed_forward_proj="gated-gelu", **t5)
    last = T5Features(made(lambda: T5EncoderModel(gated), device, dtype))
    ids = torch.randint(99, (1, CLIP_TOKENS), device=device)

    def encode(size: int) -> tuple[Tensor, Tensor]:
        found = [encoder(ids) for encoder in encoders]
        tokens = torch.cat([tokens for tokens, _ in found], dim=-1)
        tokens = nn.functional.pad(tokens, (0, width - tokens.shape[-1]))
        more = last(ids[:, :1].expand(1, T5_TOKENS[max(size, 512)]))
        return torch.cat([tokens, more], dim=1), torch.cat([rest for _, rest in found], dim=-1)

    return encode
