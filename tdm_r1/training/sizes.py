"""What a model weighs, without its weights: parameters and shapes that a plan multiplies.

Two published models are described here, so that they can be planned for where they are not; any
directory in diffusers' format is read from its configs and the headers of its weight files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.models import lora
from tdm_r1.models.layers import Transformer
from tdm_r1.models.loading import empty_transformer, read_json
from tdm_r1.models.published import CONFIGS, SD35_MEDIUM, ZIMAGE_TURBO
from tdm_r1.models.sd3 import SD3Transformer
from tdm_r1.models.zimage import ZImageTransformer
from tdm_r1.pipeline import SHIPPED, find_model, sampling

_CLIP_TOKENS, _T5_TOKENS = 77, 256
_CAPTION_TOKENS = 64  # of Z-Image, whose captions are as long as they are: about 40 words


@dataclass(frozen=True)
class Size:
    """One model. Counts are of numbers, not bytes; `default_side` is in pixels.

    transformer: on the meta device. text: encoder -> parameters. decoder_width: channels of the
    VAE's decoder where it first works at full resolution. text_tokens, text_width: of one prompt.
    solver, shift: of the stored scheduler.
    """

    source: str
    transformer: Transformer
    text: dict[str, int]
    vae: int
    decoder_width: int
    vae_scale: int
    default_side: int
    text_tokens: int
    solver: str
    shift: float

    @property
    def text_width(self) -> int:
        """Features per text token."""
        config = self.transformer.config
        return config.joint_attention_dim if self.family == "sd3" else config.cap_feat_dim

    @property
    def family(self) -> str:
        """ "sd3" or "zimage"."""
        return self.transformer.family

    @property
    def side_unit(self) -> int:
        """Sides are multiples of this many pixels."""
        return self.vae_scale * self.transformer.config.patch_size

    @property
    def parameters(self) -> int:
        """Of the transformer."""
        return sum(p.numel() for p in self.transformer.parameters())

    @property
    def buffers(self) -> int:
        """Of the transformer: SD3's table of positions."""
        return sum(b.numel() for b in self.transformer.buffers())

    @property
    def blocks(self) -> int:
        """How many blocks the image passes."""
        config: Any = self.transformer.config
        if self.family == "sd3":
            return config.num_layers
        return config.n_layers + config.n_refiner_layers

    @property
    def dual_blocks(self) -> int:
        """How many of them attend twice (SD3.5)."""
        return len(self.transformer.config.dual_attention_layers) if self.family == "sd3" else 0

    @property
    def dim(self) -> int:
        """Width D."""
        return self.transformer.config.dim

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Of one LoRA. Raises ConfigError for a target that the model does not have."""
        found = lora.find_targets(self.transformer, targets or lora.TARGETS[self.family])
        return sum(rank * sum(module.weight.shape) for module in found.values())

    def image_tokens(self, side: int) -> int:
        """Of a picture of `side` pixels."""
        return (side // self.side_unit) ** 2


def describe(name: str, t5_length: int) -> Size:
    """The size of a published, shipped or local model. Nothing is fetched.

    Raises ConfigError for any other name, LoadError for a directory that is no model.
    """
    if name in KNOWN:
        return KNOWN[name](t5_length)
    if name not in SHIPPED and not Path(name).expanduser().is_dir():
        raise ConfigError(
            f"cannot plan for model {name!r}: neither a directory nor one of "
            f"{', '.join((*KNOWN, *SHIPPED))}"
        )
    root, _ = find_model(name)
    transformer, _ = empty_transformer(root)
    vae = read_json(root / "vae" / "config.json")
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    sd3 = transformer.family == "sd3"
    solver, shift = sampling(root)
    return Size(
        source=str(root),
        transformer=transformer,
        text={
            folder.name: count_parameters(folder)
            for folder in sorted(root.glob("text_encoder*"))
            if folder.is_dir()
        },
        vae=count_parameters(root / "vae"),
        decoder_width=vae["block_out_channels"][1 if scale > 1 else 0],
        vae_scale=scale,
        default_side=transformer.config.sample_size * scale if sd3 else vae["sample_size"],
        text_tokens=_sd3_tokens(root, t5_length) if sd3 else _CAPTION_TOKENS,
        solver=solver,
        shift=shift,
    )


def count_parameters(folder: Path) -> int:
    """Numbers in a folder's safetensors files, from their headers. Raises LoadError for none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise LoadError(f"{folder} holds no .safetensors file")
    total = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                total += sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise LoadError(f"weights file {path} is damaged: {error}") from error
    return total


def _sd3_tokens(root: Path, t5_length: int) -> int:
    def longest(folder: str, default: int) -> int:
        file = root / folder / "tokenizer_config.json"
        return int(read_json(file).get("model_max_length", default)) if file.is_file() else default

    clip = longest("tokenizer", _CLIP_TOKENS)
    return clip + (t5_length or min(_T5_TOKENS, longest("tokenizer_3", _T5_TOKENS)))


@lru_cache
def _sd35_medium(t5_length: int) -> Size:
    with torch.device("meta"):
        transformer = SD3Transformer(CONFIGS[SD35_MEDIUM])
    text = {"CLIP-L": 123_650_304, "CLIP-G": 694_659_840, "T5-XXL": 4_762_310_656}
    tokens = _CLIP_TOKENS + (t5_length or _T5_TOKENS)
    return Size(_BUILT_IN, transformer, text, _VAE, 256, 8, 1024, tokens, "euler", 3.0)


@lru_cache
def _zimage_turbo(t5_length: int) -> Size:
    with torch.device("meta"):
        transformer = ZImageTransformer(CONFIGS[ZIMAGE_TURBO])
    # Qwen3-4B without its last layer and its last norm, which are never run.
    text = {"Qwen3-4B": 4_022_468_096 - 100_930_816 - 2560}
    return Size(_BUILT_IN, transformer, text, _VAE, 256, 8, 1024, _CAPTION_TOKENS, "euler", 3.0)


_BUILT_IN = "its published configuration; the weights were not looked at"
_VAE = 83_819_683
KNOWN = {
    SD35_MEDIUM: _sd35_medium,
    ZIMAGE_TURBO: _zimage_turbo,
}
