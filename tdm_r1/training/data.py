"""Captioned pictures for `sft`: drawn by the embedded world, or read from an image folder.

An image folder follows the Hugging Face convention: metadata.jsonl with `file_name` and `text`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tdm_r1 import shapes
from tdm_r1.config import Data
from tdm_r1.errors import ConfigError
from tdm_r1.models.conditioning import Condition
from tdm_r1.pipeline import Pipeline
from tdm_r1.prompts import read_lines
from tdm_r1.trajectory import DECODE_LIMIT

_BATCH = 64


@dataclass(frozen=True)
class LatentDataset:
    """N latents with a caption each. `condition` has one row per different caption, the last is "".

    latents_NChw: normalised, stored as fp16; caption_N: int64 row of `condition`.
    """

    latents_NChw: Tensor
    caption_N: Tensor
    condition: Condition
    device: torch.device

    def batch(
        self, num: int, dropout: float, generator: torch.Generator
    ) -> tuple[Tensor, Condition]:
        """Draw `num` pairs with replacement; a caption becomes "" with probability `dropout`."""
        index = torch.randint(len(self.latents_NChw), (num,), generator=generator)
        rows = self.caption_N[index]
        drop = torch.rand(num, generator=generator) < dropout
        rows = torch.where(drop, len(self.condition) - 1, rows)
        x0 = self.latents_NChw[index].float().to(self.device)
        return x0, self.condition.rows(rows).to(device=self.device)


def load_data(config: Data, pipeline: Pipeline, seed: int) -> LatentDataset:
    """Render or read the pictures, encode them once, encode every different caption once.

    At most as many pixels go through the VAE at a time as are decoded at a time.
    Raises ConfigError for a folder without usable metadata.jsonl or pictures of unequal sizes.
    """
    if config.source == "shapes":
        pictures, texts = _draw(config, seed)
    else:
        pictures, texts = _read_folder(Path(config.source), pipeline)
    latents = []
    count = max(1, min(_BATCH, DECODE_LIMIT // pictures[0][..., 0].size))
    for start in range(0, len(pictures), count):
        x = torch.from_numpy(np.stack(pictures[start : start + count]))
        x = x.permute(0, 3, 1, 2).float().div(255).to(pipeline.device)
        with torch.no_grad():
            latents.append(pipeline.vae.encode(x).half().cpu())
    unique = [*dict.fromkeys(texts), ""]
    row = {text: i for i, text in enumerate(unique)}
    parts = [unique[i : i + 128] for i in range(0, len(unique), 128)]
    condition = Condition.cat([pipeline.text.encode(part).to(device="cpu") for part in parts])
    caption_N = torch.tensor([row[text] for text in texts])
    return LatentDataset(torch.cat(latents), caption_N, condition, pipeline.device)


def _draw(config: Data, seed: int) -> tuple[list[np.ndarray], list[str]]:
    rng = np.random.default_rng(seed)
    pools = [shapes.captions(family) for family in config.families]
    if not pools:
        raise ConfigError("data.families is empty")
    texts = []
    for i in range(config.num_pictures):
        pool = pools[i % len(pools)]
        texts.append(pool[int(rng.integers(len(pool)))])
    return [shapes.render(text, rng) for text in texts], texts


def _read_folder(folder: Path, pipeline: Pipeline) -> tuple[list[np.ndarray], list[str]]:
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise ConfigError(
            f"data.source must be 'shapes' or a folder with metadata.jsonl; no {metadata}"
        )
    pictures: list[np.ndarray] = []
    texts: list[str] = []
    for number, line in enumerate(read_lines(metadata, "data.source"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except ValueError as error:
            raise ConfigError(f"{metadata}:{number} is not JSON: {error}") from error
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{metadata}:{number} lacks file_name or text: {error}") from error
        try:
            picture = _upright(Image.open(folder / name))
        except OSError as error:
            raise ConfigError(f"{metadata}:{number}: cannot read {name}: {error}") from error
        if not isinstance(text, str):
            raise ConfigError(f"{metadata}:{number}: text is {text!r}; allowed: a string")
        if pictures and picture.shape != pictures[0].shape:
            sizes = ["{1} x {0}".format(*p.shape) for p in (picture, pictures[0])]
            raise ConfigError(
                f"{metadata}:{number}: {name} is {sizes[0]}, those before are {sizes[1]}:"
                " pictures must share one size"
            )
        pictures.append(picture)
        texts.append(text)
    if not pictures:
        raise ConfigError(f"{metadata} lists no pictures")
    height, width, _ = pictures[0].shape
    if height % (unit := pipeline.size_unit) or width % unit:
        raise ConfigError(
            f"{metadata}: pictures are {width} x {height}; allowed: multiples of {unit}"
        )
    return pictures, texts


def _upright(picture: Image.Image) -> np.ndarray:
    """RGB [H, W, 3], turned as its EXIF data say, on white where it is transparent."""
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.asarray(picture.convert("RGB"))
