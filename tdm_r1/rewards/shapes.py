"""The embedded world's own checker as a reward: captions that it can verify exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from tdm_r1.shapes import CLEAN, Verdict, check, detect


def dense(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Share of the caption that the picture shows: B floats in [0, 1].

    Raises ConfigError for a caption outside the embedded world.
    """
    return [verdict.dense for verdict in _verdicts(images, prompts)]


def strict(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """1.0 where the picture shows its caption in full and nothing else, otherwise 0.0: B floats.

    Raises ConfigError for a caption outside the embedded world.
    """
    return [verdict.strict for verdict in _verdicts(images, prompts)]


def clean(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """1.0 where there are shapes, each of one colour, and nothing else, otherwise 0.0: B floats.

    The captions are not read. What a few-step model leaves undecided, such as a square half red and
    half yellow, is not clean.
    """
    found = [detect(_pixels(image)) for image in images]
    return [float(share > CLEAN and all(d.shape for d in segments)) for segments, share in found]


def _verdicts(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Verdict]:
    return [check(prompt, _pixels(image)) for image, prompt in zip(images, prompts, strict=True)]


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))
