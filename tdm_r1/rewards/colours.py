"""What colour is an object? By a vote of its pixels, or by CLIP as GenEval does.

Both answer with one of GenEval's ten colours. H, W: a picture's height and width; N: objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from tdm_r1.errors import ConfigError
from tdm_r1.geneval import COLOURS
from tdm_r1.rewards.detectors import BATCH, Detected, pick_device

BACKGROUND = (0x99, 0x99, 0x99)
TEMPLATES = (
    "a photo of a {c} {name}",
    "a photo of a {c}-colored {name}",
    "a photo of a {c} object",
)
# Upper ends of the hues, in degrees; the last wraps round to red again.
_HUES = ((15, "red"), (40, "orange"), (70, "yellow"), (165, "green"), (255, "blue"),
         (310, "purple"), (345, "pink"), (361, "red"))  # fmt: skip


class Colours(Protocol):
    """Names the colour of each of a picture's objects, which are all of one class."""

    def __call__(self, image: Image.Image, found: Sequence[Detected]) -> list[str]: ...


def hsv_vote(image: Image.Image, found: Sequence[Detected]) -> list[str]:
    """The most frequent colour name among an object's pixels; ties go to the first of `COLOURS`.

    The pixels are those of the mask, or without one of the ellipse inscribed in the box. A pixel is
    black below value 0.2; below saturation 0.2 it is white, from value 0.6, or black, to 0.35, or
    grey, which is no colour and does not vote; the others are named by hue, where dark orange
    (value below 0.6) is brown and pale red (saturation below 0.6, value above 0.8) is pink. An
    object all grey is white or black, whichever is nearer. The thresholds are this project's.
    """
    rgb_HW3 = np.asarray(image.convert("RGB"))
    names_HW = _pixel_names(rgb_HW3)
    answers = []
    for item in found:
        inside_HW = item.mask_HW if item.mask_HW is not None else _ellipse(item.box, rgb_HW3.shape)
        votes = np.bincount(names_HW[inside_HW] + 1, minlength=len(COLOURS) + 1)[1:]
        if votes.any():
            answers.append(COLOURS[int(votes.argmax())])
        else:
            bright = rgb_HW3[inside_HW].max(axis=-1).mean() if inside_HW.any() else 0
            answers.append("white" if bright > 121 else "black")  # between values 0.35 and 0.6
    return answers


class ClipColours:
    """GenEval's colours: zero-shot CLIP on each object's crop, its surroundings painted #999.

    Each colour's text feature is the mean of the normalised features of `TEMPLATES`, the answer
    the colour of greatest cosine similarity to the crop. GenEval uses ViT-L/14.
    """

    def __init__(self, name_or_dir: str, device: str = "auto") -> None:
        """Raises ConfigError for what is no CLIP model with its processor."""
        from transformers import AutoConfig, CLIPModel, CLIPProcessor

        self.device = pick_device(device)
        try:
            kind = AutoConfig.from_pretrained(name_or_dir).model_type
            if kind != "clip":
                raise ConfigError(f"clip {name_or_dir} is a {kind} model; allowed: clip")
            self.processor = CLIPProcessor.from_pretrained(name_or_dir)
            self.model: Any = CLIPModel.from_pretrained(name_or_dir).to(self.device).eval()
        except (OSError, ImportError, ValueError, RuntimeError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(f"cannot load the CLIP model {name_or_dir!r}: {reason}") from error
        self._texts: dict[str, torch.Tensor] = {}

    def to(self, device: torch.device) -> None:
        """Move the model and what it has computed for classes."""
        self.device = device
        self.model.to(device)
        self._texts = {name: features.to(device) for name, features in self._texts.items()}

    def __call__(self, image: Image.Image, found: Sequence[Detected]) -> list[str]:
        if not found:
            return []
        crops = [crop(image.convert("RGB"), item) for item in found]
        best = self.image_features(crops) @ self.text_features(found[0].label).T
        return [COLOURS[i] for i in best.argmax(dim=1).tolist()]

    @torch.no_grad()
    def image_features(self, crops: Sequence[Image.Image]) -> torch.Tensor:
        """Unit features `[N, E]` of N crops."""
        features = []
        for start in range(0, len(crops), BATCH):
            part = list(crops[start : start + BATCH])
            pixels = self.processor(images=part, return_tensors="pt")["pixel_values"]
            pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
            features.append(self.model.visual_projection(pooled))
        return F.normalize(torch.cat(features).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, name: str) -> torch.Tensor:
        """Unit features `[10, E]` of the ten colours of a class, computed once per class."""
        if name not in self._texts:
            texts = [text.format(c=c, name=name) for c in COLOURS for text in TEMPLATES]
            inputs = self.processor(text=texts, return_tensors="pt", padding=True)
            pooled = self.model.text_model(**inputs.to(self.device)).pooler_output
            each = F.normalize(self.model.text_projection(pooled).float(), dim=-1)
            mean = each.view(len(COLOURS), len(TEMPLATES), -1).mean(dim=1)
            self._texts[name] = F.normalize(mean, dim=-1)
        return self._texts[name]


@lru_cache(maxsize=2)
def load_colours(clip: str, device: str = "auto") -> Colours:
    """Return `ClipColours` of a directory or Hub id, or `hsv_vote` for ""."""
    return ClipColours(clip, device) if clip else hsv_vote


def crop(image: Image.Image, item: Detected) -> Image.Image:
    """Cut an object out of an RGB picture, #999 around its mask; never empty."""
    if item.mask_HW is not None:
        blank = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, blank, Image.fromarray(item.mask_HW))
    return image.crop(_pixels(item.box, image.width, image.height))


def _pixels(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """The box in whole pixels of the picture, at least one."""
    x0, y0 = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
    x1, y1 = int(np.ceil(box[2])), int(np.ceil(box[3]))
    return x0, y0, min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)


def _ellipse(box: Sequence[float], shape: Sequence[int]) -> np.ndarray:
    """Bool `[H, W]`: pixels whose centre is inside the ellipse inscribed in the box."""
    height, width = shape[:2]
    x0, y0, x1, y1 = _pixels(box, width, height)
    y_H1 = (np.arange(height)[:, None] + 0.5 - (y0 + y1) / 2) / ((y1 - y0) / 2)
    x_1W = (np.arange(width)[None] + 0.5 - (x0 + x1) / 2) / ((x1 - x0) / 2)
    return x_1W**2 + y_H1**2 <= 1.0


def _pixel_names(rgb_HW3: np.ndarray) -> np.ndarray:
    """Index into `COLOURS` of every pixel, -1 for grey: int64 `[H, W]`."""
    hsv_HW3 = cv2.cvtColor(rgb_HW3.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hue, saturation, value = hsv_HW3[..., 0], hsv_HW3[..., 1], hsv_HW3[..., 2]
    ends = [end for end, _ in _HUES]
    order = np.array([COLOURS.index(name) for _, name in _HUES])
    names_HW = order[np.searchsorted(ends, hue, side="right")]
    red, orange = names_HW == COLOURS.index("red"), names_HW == COLOURS.index("orange")
    names_HW[red & (saturation < 0.6) & (value > 0.8)] = COLOURS.index("pink")
    names_HW[orange & (value < 0.6)] = COLOURS.index("brown")
    pale = saturation < 0.2
    names_HW[pale] = -1
    names_HW[pale & (value >= 0.6)] = COLOURS.index("white")
    names_HW[(pale & (value <= 0.35)) | (value < 0.2)] = COLOURS.index("black")
    return names_HW
