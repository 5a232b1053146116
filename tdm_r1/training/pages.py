"""Pictures side by side: what a run has changed.

output/samples/000050.png   the first prompts of the evaluation after 50 iterations, on the left
                            as they were before training: same prompts, same noise
output/samples/before.png   the pictures before training, unscaled, in one row
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from tdm_r1.training.evaluate import Sample

GREEN, RED, BLACK = (20, 130, 60), (200, 40, 30), (0, 0, 0)
_CELL, _LABEL, _GAP = 128, 30, 8  # pixels: one picture's side, a line of text, around a prompt

Label = tuple[str, tuple[int, int, int]]  # the text under a picture, and its colour


def write_sample(output: Path, iteration: int, sample: Sample) -> Path:
    """Write samples/<iteration>.png, and at iteration 0 what later pages show on the left.

    A page of other prompts than those of iteration 0 stands alone. Returns the file.
    """
    folder = output / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    if iteration == 0:
        _write_row(folder / "before.png", sample)
    before = _read_row(folder / "before.png") if iteration else None
    file = folder / f"{iteration:06d}.png"
    now = [(f"{value:.3g}", BLACK) for value in sample.values]
    if before is None or before.prompts != sample.prompts:
        page = comparison(sample.prompts, [sample.pictures], [now])
    else:
        then = [(f"{value:.3g}", BLACK) for value in before.values]
        pairs = zip(before.values, sample.values, strict=True)
        now = [(text, _trend(*pair)) for (text, _), pair in zip(now, pairs, strict=True)]
        page = comparison(sample.prompts, [before.pictures, sample.pictures], [then, now])
    page.save(file)
    return file


def forget(output: Path) -> None:
    """Remove the pages of an earlier run: a new one begins in its folder."""
    for file in (output / "samples").glob("*.png"):
        if file.stem == "before" or file.stem.isdigit():
            file.unlink()


def comparison(
    prompts: Sequence[str],
    pictures: Sequence[Sequence[Image.Image]],
    labels: Sequence[Sequence[Label]],
    columns: int = 4,
) -> Image.Image:
    """A page of prompts, each above its pictures side by side, a label under each picture.

    `pictures` and `labels` are one sequence per side, before and after for instance, of as many
    items as there are prompts.
    """
    width = max(2, len(pictures)) * _CELL + 2 * _GAP
    height = _CELL + 2 * _LABEL
    rows = -(-len(prompts) // columns)
    page = Image.new("RGB", (min(columns, len(prompts)) * width, rows * height), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    for i, prompt in enumerate(prompts):
        x, y = i % columns * width + _GAP, i // columns * height
        draw.text((x, y + _GAP), _fit(prompt, width - 2 * _GAP, font), fill="black", font=font)
        for j, (side, texts) in enumerate(zip(pictures, labels, strict=True)):
            left, size = x + j * _CELL, (_CELL - 4, _CELL - 4)
            small = side[i].width < _CELL
            method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            page.paste(side[i].resize(size, method), (left, y + _LABEL))
            text, colour = texts[i]
            draw.text((left, y + _LABEL + _CELL), text, fill=colour, font=font)
    return page


def _trend(before: float, now: float) -> tuple[int, int, int]:
    return GREEN if now > before else RED if now < before else BLACK


def _fit(text: str, width: int, font: Any) -> str:
    """The beginning of a text that fits into so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _write_row(file: Path, sample: Sample) -> None:
    """Pictures in one row, pixel for pixel, their prompts and values in the file's text."""
    width, height = sample.pictures[0].size
    row = Image.new("RGB", (width * len(sample.pictures), height))
    for i, picture in enumerate(sample.pictures):
        row.paste(picture, (i * width, 0))
    facts = PngInfo()
    facts.add_text("sample", json.dumps({"prompts": sample.prompts, "values": sample.values}))
    row.save(file, pnginfo=facts)


def _read_row(file: Path) -> Sample | None:
    """Undo `_write_row`; None where there is no such file."""
    if not file.is_file():
        return None
    with Image.open(file) as row:
        facts = json.loads(row.text["sample"])
        width = row.width // len(facts["prompts"])
        edges = range(0, row.width, width)
        pictures = [row.crop((left, 0, left + width, row.height)) for left in edges]
    return Sample(facts["prompts"], pictures, facts["values"])
