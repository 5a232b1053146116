"""The held-out panel: what pictures are like, whatever the training reward says of them.

H, W: height and width; a picture is RGB, its values divided by 255.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

_CELLS = 32  # diversity compares pictures of this many cells a side


def sharpness(image: Image.Image) -> float:
    """Variance over the pixels of the Laplacian of the luma, in squared luma (luma is in [0, 1]).

    y = 0.299 R + 0.587 G + 0.114 B; L = y[i-1,j] + y[i+1,j] + y[i,j-1] + y[i,j+1] - 4 y[i,j] at the
    (H-2)(W-2) inner pixels (Pech-Pacheco et al., 2000). 0 for a plain picture and for a straight
    ramp, 16 for a checkerboard of single pixels. Falls when pictures blur, rises when they turn
    noisy or over-sharp. Raises ValueError for a picture of less than 3 x 3 pixels.
    """
    y_HW = _rgb(image) @ np.array([0.299, 0.587, 0.114])
    if min(y_HW.shape) < 3:
        raise ValueError(f"sharpness wants at least 3 x 3 pixels; got {image.size}")
    neighbours = y_HW[:-2, 1:-1] + y_HW[2:, 1:-1] + y_HW[1:-1, :-2] + y_HW[1:-1, 2:]
    return float((neighbours - 4 * y_HW[1:-1, 1:-1]).var())


def saturation(image: Image.Image) -> float:
    """Mean over the pixels of HSV's saturation, (max - min) / max of R, G, B, black counting 0.

    In [0, 1]: 0 for greys, 1 where every pixel lacks one of the primaries.
    """
    rgb_HW3 = _rgb(image)
    top_HW, low_HW = rgb_HW3.max(-1), rgb_HW3.min(-1)
    return float(((top_HW - low_HW) / np.where(top_HW > 0, top_HW, 1)).mean())


def diversity(images: Sequence[Image.Image], prompts: Sequence[str]) -> float | None:
    """How much pictures of one prompt differ: in [0, 1], 0 when all of them are the same.

    Root mean square difference of two pictures, each averaged to 32 x 32 cells of RGB; mean over
    the pairs of a group, then over the groups. A group is the pictures of one prompt; None where no
    prompt has two.
    """
    groups: dict[str, list[np.ndarray]] = {}
    for image, prompt in zip(images, prompts, strict=True):
        small = image.convert("RGB").resize((_CELLS, _CELLS), Image.Resampling.BOX)
        groups.setdefault(prompt, []).append(_rgb(small).reshape(-1))
    means = [_mean_distance(np.stack(group)) for group in groups.values() if len(group) > 1]
    return float(np.mean(means)) if means else None


def statistics(images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
    """Mean sharpness and saturation of pictures, and their diversity where prompts are repeated."""
    found = {
        "sharpness": float(np.mean([sharpness(image) for image in images])),
        "saturation": float(np.mean([saturation(image) for image in images])),
    }
    spread = diversity(images, prompts)
    return found if spread is None else {**found, "diversity": spread}


def fell(before: dict[str, float], now: dict[str, float], start: dict[str, float]) -> bool:
    """Whether a panel got worse from one evaluation to the next.

    With a "held_out_reward", when that fell. Without one, when most of the statistics got worse:
    less diversity; sharpness or saturation further, by their ratio, from those at the start, for a
    reward that is being gamed drives them either way.
    """
    if "held_out_reward" in now:
        return now["held_out_reward"] < before["held_out_reward"]
    worse = [
        _drift(now[name], start[name]) > _drift(before[name], start[name])
        for name in ("sharpness", "saturation")
    ]
    if "diversity" in now:
        worse.append(now["diversity"] < before["diversity"])
    return 2 * sum(worse) > len(worse)


def _rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float64) / 255


def _mean_distance(rows: np.ndarray) -> float:
    first, second = np.triu_indices(len(rows), 1)
    return float(np.sqrt(np.square(rows[first] - rows[second]).mean(1)).mean())


def _drift(value: float, start: float) -> float:
    """|ln(value / start)|, finite for zeros."""
    tiny = 1e-9
    return abs(float(np.log((value + tiny) / (start + tiny))))
