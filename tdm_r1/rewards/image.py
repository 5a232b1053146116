"""Rewards that look at the picture alone."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image


def jpeg(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Compressibility: `-size / 500`, the size in kB (1000 bytes) of the JPEG at quality 95.

    Returns B floats below 0; plain pictures score highest. Needs no model, which makes it the
    classic first check that a training loop moves its reward at all (DDPO).
    """
    return [-_jpeg_bytes(image) / 500e3 for image in images]


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return buffer.tell()
