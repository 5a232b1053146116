"""A model's parts as modules of tensors only, to be traced: which inputs, and which axes vary.

Shapes: B batch, T text tokens, P caption tokens padded to a multiple of 32, n image tokens, I image
tokens padded likewise, D width, E text width, H head width, K steps, M modulation vectors, C latent
channels, h w latent size, R C patch rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from tdm_r1.models.conditioning import Condition
from tdm_r1.models.layers import Transformer, patchify, timestep_features
from tdm_r1.models.sd3 import SD3Transformer
from tdm_r1.models.zimage import ZImageContext, ZImageTransformer, run_blocks
from tdm_r1.models.zimage_layout import ceil_to_multiple
from tdm_r1.pipeline import Pipeline

Axes = dict[str, tuple[int, int]]
TYPICAL_CAPTION = 64  # tokens of a sentence in Z-Image's chat template


@dataclass(frozen=True)
class Axis:
    """One axis of an input.

    size: in the example that is traced. dim: the `torch.export.Dim`, None if fixed. bounds: the
    lowest, the typical and the highest size, for an engine's optimisation profile.
    """

    size: int
    dim: Any
    bounds: tuple[int, int, int]

    @classmethod
    def ranging(
        cls,
        name: str,
        low: int,
        high: int,
        example: int,
        scale: int = 1,
        typical: int | None = None,
    ) -> Axis:
        """An axis of `scale` times low to high; one value only is a fixed size.

        `typical`, by default `high`, is what an engine is tuned for, moved into the range.
        """
        typical = high if typical is None else min(max(typical, low), high)
        bounds = (scale * low, scale * typical, scale * high)
        if low == high:
            return cls(scale * low, None, bounds)
        return cls(scale * example, scale * Dim(name, min=low, max=high), bounds)


@dataclass(frozen=True)
class Graph:
    """One graph to be: the module, and by name its inputs (int is a fixed axis) and outputs."""

    name: str
    module: nn.Module
    inputs: Mapping[str, tuple[int | Axis, ...]]
    outputs: tuple[str, ...]
    ids: bool = False  # the input is int64

    def examples(self) -> tuple[Tensor, ...]:
        """Return zeros to trace with, fp32 or int64; lengths are ones."""
        shapes = [
            [axis.size if isinstance(axis, Axis) else axis for axis in axes]
            for axes in self.inputs.values()
        ]
        integer = [self.ids or name == "lengths_B" for name in self.inputs]
        return tuple(
            torch.ones(shape, dtype=torch.int64) if whole else torch.zeros(shape)
            for shape, whole in zip(shapes, integer, strict=True)
        )

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """Return, per input, the axes that vary, as torch.export takes them."""
        return tuple(
            {i: a.dim for i, a in enumerate(axes) if isinstance(a, Axis) and a.dim is not None}
            for axes in self.inputs.values()
        )

    def profile(self) -> dict[str, list[list[int]]]:
        """Return, per input, its lowest, typical and highest shape."""
        return {
            name: [[a.bounds[i] if isinstance(a, Axis) else a for a in axes] for i in range(3)]
            for name, axes in self.inputs.items()
        }


@contextmanager
def traceable(transformer: Transformer) -> Iterator[None]:
    """Bind the reference ops and unpack the linears: what is left to trace is plain PyTorch."""
    backend, transformer.backend = transformer.backend, "reference"
    transformer.unfreeze()
    try:
        yield
    finally:
        transformer.backend = backend
        transformer.freeze()


@contextmanager
def in_fp32(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Hold the parameters of some modules of a model in fp32 for a while.

    The schedule's embedded times are constants of a graph, so they need not be rounded. The model's
    first parameter comes along, by which it tells its dtype.
    """
    parameters = [next(model.parameters()), *(p for module in modules for p in module.parameters())]
    dtypes = [parameter.dtype for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)


def make_graphs(pipeline: Pipeline, timesteps: tuple[float, ...], axes: Axes) -> Iterator[Graph]:
    """Yield the graphs of a model for one schedule, for `traceable` to surround.

    The transformer's two come first, and need no more of text encoders and VAE than their sizes.
    """
    batch = Axis.ranging("batch", *axes["batch"], example=2, typical=1)
    family = _sd3 if pipeline.family == "sd3" else _zimage
    yield from family(pipeline, timesteps, axes, batch)
    latents = (batch, pipeline.vae.latent_channels, *_latent_axes(pipeline, axes))
    yield Graph(
        "vae_decoder", VAEDecoder(pipeline.vae), {"latents_BChw": latents}, ("images_B3HW",)
    )


def _latent_axes(pipeline: Pipeline, axes: Axes) -> tuple[Axis, Axis]:
    """Latent height and width: whole patches. Unequal examples, so that neither stands for both."""
    patch = pipeline.transformer.config.patch_size
    unit = pipeline.size_unit
    side = pipeline.default_size // unit
    (top, bottom), (left, right) = (
        [end // unit for end in axes[name]] for name in ("height", "width")
    )
    return (
        Axis.ranging("rows", top, bottom, max(2, top), patch, side),
        Axis.ranging("cols", left, right, right, patch, side),
    )


def _sd3(
    pipeline: Pipeline, timesteps: tuple[float, ...], axes: Axes, batch: Axis
) -> Iterator[Graph]:
    model: Any = pipeline.transformer
    text: Any = pipeline.text
    config, clip = model.config, text.clip_length
    low, high = axes["text"]
    joint = Axis.ranging("text", clip + low, clip + high, clip + high)
    rows, cols = _latent_axes(pipeline, axes)
    unit, num_vectors = pipeline.size_unit, sum(model.chunk_sizes())
    yield Graph(
        "context",
        SD3Prompt(model, timesteps),
        {
            "tokens_BTE": (batch, joint, config.joint_attention_dim),
            "pooled_BE": (batch, config.pooled_projection_dim),
        },
        ("tokens_BTD", "modulation_KMB1D"),
    )
    yield Graph(
        "transformer",
        SD3Step(model, *(axes[side][1] // unit for side in ("height", "width"))),
        {
            "x_BChw": (batch, config.in_channels, rows, cols),
            "tokens_BTD": (batch, joint, config.dim),
            "mod_MB1D": (num_vectors, batch, 1, config.dim),
        },
        ("out_Bnf",),
    )
    for suffix, (_, features) in zip(("", "_2"), text.clips, strict=True):
        outputs = ("tokens_BTE", "pooled_BE")
        inputs = {"ids_BT": (batch, clip)}
        yield Graph(f"text_encoder{suffix}", encoder_module(features), inputs, outputs, ids=True)
    if text.t5 is not None:
        tokens = Axis.ranging("text", low, high, high)
        features, inputs = encoder_module(text.t5[1]), {"ids_BT": (batch, tokens)}
        yield Graph("text_encoder_3", features, inputs, ("tokens_BTE",), ids=True)


def _zimage(
    pipeline: Pipeline, timesteps: tuple[float, ...], axes: Axes, batch: Axis
) -> Iterator[Graph]:
    model: Any = pipeline.transformer
    text: Any = pipeline.text
    config, head_dim = model.config, model.config.dim // model.config.n_heads
    rows, cols = _latent_axes(pipeline, axes)
    low, high = (ceil_to_multiple(end) for end in axes["text"])
    captions = Axis.ranging("captions", low, high, high, typical=TYPICAL_CAPTION)
    unit = pipeline.size_unit
    ends = [axes["height"][i] * axes["width"][i] // unit**2 for i in (0, 1)]
    low, high = (ceil_to_multiple(end) for end in ends)
    typical = rows.bounds[1] * cols.bounds[1] // config.patch_size**2
    image = Axis.ranging("image", low, high, high, typical=ceil_to_multiple(typical))
    rope_text = (1, captions, 1, head_dim)
    yield Graph(
        "context",
        ZImagePrompt(model, timesteps),
        {
            "tokens_BPE": (batch, captions, config.cap_feat_dim),
            "lengths_B": (batch,),
            "rope_text_1P1H": rope_text,
        },
        ("text_BPD", "modulation_KM11D"),
    )
    num_vectors = 4 * (len(model.noise_refiner) + len(model.layers)) + 1
    yield Graph(
        "transformer",
        ZImageStep(model),
        {
            "x_BChw": (batch, config.in_channels, rows, cols),
            "text_BPD": (batch, captions, config.dim),
            "rope_image_1I1H": (1, image, 1, head_dim),
            "rope_text_1P1H": rope_text,
            "mod_M11D": (num_vectors, 1, 1, config.dim),
        },
        ("out_BIf",),
    )
    low, high = axes["text"]
    tokens = Axis.ranging("text", low, high, high, typical=TYPICAL_CAPTION)
    features, inputs = encoder_module(text.features), {"ids_BT": (batch, tokens)}
    yield Graph("text_encoder", features, inputs, ("tokens_BTE",), ids=True)


class SD3Prompt(nn.Module):
    """Embedded text and the schedule's modulation; the embedded times are constants."""

    time_K1D: Tensor

    def __init__(self, model: SD3Transformer, timesteps: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        embedder = model.time_text_embed.timestep_embedder
        with in_fp32(model, [embedder]):
            features = timestep_features(torch.tensor(timesteps)[:, None])
            self.register_buffer("time_K1D", embedder(features))

    def forward(self, tokens_BTE: Tensor, pooled_BE: Tensor) -> tuple[Tensor, Tensor]:
        model, dtype = self.model, self.model.dtype
        pooled_BD = model.time_text_embed.text_embedder(pooled_BE.to(dtype))
        tokens_BTD = model.context_embedder(tokens_BTE.to(dtype)).float()
        return tokens_BTD, model.modulate((self.time_K1D + pooled_BD).to(dtype))


class SD3Step(nn.Module):
    """`SD3Transformer.forward`; of the position table it keeps what the largest size reads."""

    table_RCD: Tensor

    def __init__(self, model: SD3Transformer, max_rows: int, max_cols: int) -> None:
        super().__init__()
        self.model = model
        self.side = side = model.config.pos_embed_max_size
        self.top, self.left = (side - max_rows) // 2, (side - max_cols) // 2
        table = model.pos_embed.pos_embed.view(side, side, -1)
        table = table[self.top : self.top + max_rows, self.left : self.left + max_cols]
        self.register_buffer("table_RCD", table.clone())

    def forward(self, x_BChw: Tensor, tokens_BTD: Tensor, mod_MB1D: Tensor) -> Tensor:
        model, p = self.model, self.model.config.patch_size
        rows, cols = x_BChw.shape[2] // p, x_BChw.shape[3] // p
        # Gathered, not sliced: nobody can prove to the exporter that a centred slice fits.
        rows_R = torch.arange(rows) + ((self.side - rows) // 2 - self.top)
        cols_C = torch.arange(cols) + ((self.side - cols) // 2 - self.left)
        position_nD = self.table_RCD[rows_R][:, cols_C].flatten(0, 1) + model.pos_embed.bias
        patches = patchify(x_BChw, p, model.dtype, channels_last=False)
        h_BnD = F.linear(patches, model.pos_embed.weight) + position_nD
        return model.blocks(h_BnD, tokens_BTD.to(model.dtype), mod_MB1D).float()


class ZImagePrompt(nn.Module):
    """Refined captions of one padded length; the schedule's modulation is a constant."""

    table_KM11D: Tensor

    def __init__(self, model: ZImageTransformer, timesteps: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        t_K1: Any = torch.tensor(timesteps)[:, None]
        no_context: Any = None  # the modulation of Z-Image is a function of time alone
        used = [model.t_embedder, model.all_final_layer, *model.siblings("modulation")]
        with in_fp32(model, used):
            self.register_buffer("table_KM11D", model.modulation(no_context, t_K1))

    def forward(
        self, tokens_BPE: Tensor, lengths_B: Tensor, rope_text_1P1H: Tensor
    ) -> tuple[Tensor, Tensor]:
        model = self.model
        text_BPD = model.embed_captions(Condition(tokens_BPE, lengths_B), tokens_BPE.shape[1])
        blocks = model.context_refiner
        plain = [None] * len(blocks)
        text_BPD = run_blocks(blocks, text_BPD, model.ops, rope_text_1P1H, None, plain)
        return text_BPD.float(), self.table_KM11D.clone()


class ZImageStep(nn.Module):
    """`ZImageTransformer.forward` for prompts of one padded length; image pads come back too."""

    def __init__(self, model: ZImageTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        x_BChw: Tensor,
        text_BPD: Tensor,
        rope_image_1I1H: Tensor,
        rope_text_1P1H: Tensor,
        mod_M11D: Tensor,
    ) -> Tensor:
        model, num_rows = self.model, rope_image_1I1H.shape[1]
        h_BnD = model.embed_patches(x_BChw)
        # As many pads as there can be, then a cut: the graph knows no number of pads that may be 0.
        pads = model.x_pad_token.expand(h_BnD.shape[0], num_rows, -1)
        h_BID = torch.cat([h_BnD, pads], dim=1)[:, :num_rows]
        rope = torch.cat([rope_image_1I1H, rope_text_1P1H], dim=1)
        context = ZImageContext(text_BPD.to(model.dtype), rope_image_1I1H, rope, None, 0)
        return model.denoise(h_BID, context, mod_M11D, num_rows).float()


class VAEDecoder(nn.Module):
    """`VAE.decode`."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder, self.first = vae.model.decoder, vae.model.post_quant_conv
        self.scaling, self.shift, self.dtype = vae.scaling, vae.shift, vae.dtype

    def forward(self, latents_BChw: Tensor) -> Tensor:
        z_BChw = (latents_BChw / self.scaling + self.shift).to(self.dtype)
        if self.first is not None:
            z_BChw = self.first(z_BChw)
        return (self.decoder(z_BChw).float() * 0.5 + 0.5).clamp(0.0, 1.0)


class LowText(nn.Module):
    """A text encoder in half precision whose features leave in fp32, as every graph's outputs do.

    Its activations compute in fp32, in place: PyTorch multiplies half precision by scalars such as
    GELU's 0.044715 as they are, but in a graph they would be rounded like everything else.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        for module in list(features.modules()):
            for name, child in list(module.named_children()):
                if type(child).__module__ == "transformers.activations":
                    setattr(module, name, InFP32(child))

    def forward(self, ids_BT: Tensor) -> Any:
        outputs = self.features(ids_BT)
        if isinstance(outputs, tuple):
            return tuple(output.float() for output in outputs)
        return outputs.float()


class InFP32(nn.Module):
    """An activation that computes in fp32 whatever it is given."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x.float()).to(x.dtype)


def encoder_module(features: Any) -> nn.Module:
    """Return what is traced of a text encoder: `features`, in half precision `LowText` of it."""
    low = next(features.parameters()).dtype != torch.float32
    return LowText(features) if low else features
