"""Text rendering: read the picture and compare with the text that the prompt puts in quotes.

The reader is RapidOCR (PP-OCRv6 small, whose weights come inside the package) on ONNX Runtime. It
is the only reader of this project: the embedded world's checker uses `read_text` too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from tdm_r1.errors import ConfigError

try:
    from rapidocr import RapidOCR
except ImportError as error:
    raise ConfigError("reading text needs RapidOCR: pip install 'tdm-r1[ocr]'") from error

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def contains(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """1 if the text read contains the target, else `1 - min(d, L) / L`: B floats in [0, 1].

    d is the edit distance from the text read to the target, L the target's length; both texts are
    compared in lower case without white space. This is the field's usual OCR reward (Flow-GRPO,
    TDM-R1). It can be gamed by a wall of text, which contains everything: see `exact`.
    Raises ConfigError for a prompt without text in double quotes.
    """
    return _rewards(images, prompts, anywhere=True)


def exact(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """`1 - min(d, L) / L` with no credit for containing the target: B floats in [0, 1].

    1 only if nothing but the target was read, so that surplus text costs as much as missing text.
    Symbols as in `contains`. Raises ConfigError for a prompt without text in double quotes.
    """
    return _rewards(images, prompts, anywhere=False)


def read_text(image: np.ndarray | Image.Image) -> str:
    """Everything legible in an RGB picture, top to bottom, lines separated by spaces.

    `image` is a PIL picture or uint8 `[H, W, 3]`. Returns "" for a picture without text.
    """
    rgb_HW3 = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    bgr_HW3 = np.ascontiguousarray(rgb_HW3[..., ::-1])
    return " ".join(_reader()(bgr_HW3).txts or ())


def target_text(prompt: str) -> str:
    """The text between a prompt's first pair of double quotes; ConfigError if there is none."""
    match = _QUOTED.search(prompt)
    text = (match[1] or match[2] or "") if match else ""
    if not _normal(text):
        raise ConfigError(f"the reward 'ocr' needs a prompt with text in double quotes: {prompt!r}")
    return text


def _rewards(images: Sequence[Image.Image], prompts: Sequence[str], anywhere: bool) -> list[float]:
    targets = [_normal(target_text(prompt)) for prompt in prompts]  # fail before reading anything
    return [
        _similarity(target, _normal(read_text(image)), anywhere)
        for target, image in zip(targets, images, strict=True)
    ]


def _similarity(target: str, text: str, anywhere: bool) -> float:
    if anywhere and target in text:
        return 1.0
    return 1.0 - min(levenshtein(text, target), len(target)) / len(target)


def _normal(text: str) -> str:
    return "".join(text.lower().split())


@lru_cache(maxsize=1)
def _reader() -> RapidOCR:
    return RapidOCR(
        params={
            "Global.log_level": "critical",  # it warns about every picture without text
            "Global.use_cls": False,  # the 180-degree classifier turns some upright text over
            # The detector enlarges pictures to this many pixels on the short side. The stock 736
            # reads no better on 64 and 512 pixel pictures and takes four times as long.
            "Det.limit_side_len": 256,
            # ONNX Runtime takes every core by default, whatever share a rank was given.
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
        }
    )


def levenshtein(a: str, b: str) -> int:
    """Least number of single-character insertions, deletions and substitutions from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
