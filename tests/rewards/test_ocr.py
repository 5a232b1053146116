"""The OCR rewards: their arithmetic with a scripted reader, then the real reader, sparingly."""

import logging

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tdm_r1 import shapes
from tdm_r1.errors import ConfigError
from tdm_r1.rewards import load_reward, ocr, score

PROMPT = 'a shop window that says "Grand Opening"'
LENGTH = len("grandopening")


def _sign(*lines: str, size: int = 256) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        place = (size // 16, size // 16 + i * size // 6)
        draw.text(place, line, fill="black", font=ImageFont.load_default(size // 10))
    return image


@pytest.mark.parametrize(
    ("read", "contains", "exact"),
    [
        ("Grand Opening", 1.0, 1.0),
        ("GRAND\nOPEN ING", 1.0, 1.0),
        ("the grand opening sale", 1.0, 1 - 7 / LENGTH),
        ("grand opening" * 20, 1.0, 0.0),
        ("Grand Openin", 1 - 1 / LENGTH, 1 - 1 / LENGTH),
        ("Grxnd Opening", 1 - 1 / LENGTH, 1 - 1 / LENGTH),
        ("", 0.0, 0.0),
        ("entirely different words", 0.0, 0.0),
    ],
)
def test_the_formulas(monkeypatch, read, contains, exact):
    monkeypatch.setattr(ocr, "read_text", lambda image: read)
    image = Image.new("RGB", (8, 8))
    (got_contains,) = score(load_reward("ocr"), [image], [PROMPT])
    (got_exact,) = score(load_reward("ocr:exact"), [image], [PROMPT])
    assert got_contains == pytest.approx(contains, abs=1e-12)
    assert got_exact == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('says "GO"', "GO"),
        ('first "one" then "two"', "one"),
        ("typographic “Café 7”", "Café 7"),
        ('"a" “b”', "a"),
    ],
)
def test_the_target_is_the_first_quoted_text(prompt, target):
    assert ocr.target_text(prompt) == target


@pytest.mark.parametrize("prompt", ["no text", 'an empty ""', 'only "', "'single'", 'blank "  "'])
def test_a_prompt_without_target_is_the_users_mistake(prompt):
    with pytest.raises(ConfigError, match="needs a prompt with text in double quotes"):
        score(load_reward("ocr"), [Image.new("RGB", (8, 8))], [prompt])


def test_the_real_reader_reads_lines_and_scores_them():
    images = [_sign("Grand", "Opening"), _sign("Closed"), _sign("Grand", "Opening", "SALE today")]
    contains_B = score(load_reward("ocr"), images, [PROMPT] * 3)
    exact_B = score(load_reward("ocr:exact"), images, [PROMPT] * 3)
    assert contains_B[0] == exact_B[0] == 1.0
    assert contains_B[1] < 0.5
    assert contains_B[2] == 1.0 and exact_B[2] < 0.5


def test_the_real_reader_reads_64_pixel_signs():
    words = ["GO", "STOP", "CAFE"]
    captions = [f'a sign that says "{word}"' for word in words]
    rng = np.random.default_rng(3)
    images = [Image.fromarray(shapes.render(caption, rng)) for caption in captions]
    for spec in ("ocr", "ocr:exact", "shapes", "shapes:strict"):
        assert score(load_reward(spec), images, captions).tolist() == [1.0] * 3, spec


def test_blank_noise_and_tiny_pictures_read_as_nothing_and_log_nothing(caplog, capfd):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = [Image.new("RGB", (64, 64)), Image.fromarray(noise), Image.new("L", (1, 1))]
    with caplog.at_level(logging.INFO):
        assert score(load_reward("ocr"), images, [PROMPT] * 3).tolist() == [0.0] * 3
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_arrays_pictures_and_transparency_read_alike():
    image = _sign("Hello 42", size=128)
    array = np.asarray(image)
    assert ocr.read_text(image) == ocr.read_text(array) == ocr.read_text(image.convert("RGBA"))
    assert ocr.read_text(array[:, ::-1][:, ::-1]).replace(" ", "") == "Hello42"  # a strided view


def test_the_reader_is_built_once():
    assert ocr._reader() is ocr._reader()


def test_levenshtein():
    assert [
        ocr.levenshtein(*pair) for pair in (("CAT", "CAT"), ("CAT", ""), ("KITTEN", "SITTING"))
    ] == [0, 3, 3]
