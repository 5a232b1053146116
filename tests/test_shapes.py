"""The embedded world: what is drawn is what is asked for, and the checker is not easily fooled."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tdm_r1 import shapes
from tdm_r1.errors import ConfigError

DRAWN = [family for family in shapes.FAMILIES if family != "words"]


def scene(*things, background=245):
    """A picture from (shape, colour, x, y, r), drawn without the renderer's placement."""
    image = Image.new("RGB", (64, 64), (background,) * 3)
    draw = ImageDraw.Draw(image)
    for shape, colour, x, y, r in things:
        fill = shapes.COLOURS[colour]
        if shape == "circle":
            draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
        elif shape == "square":
            draw.rectangle([x - r, y - r, x + r, y + r], fill=fill)
        else:
            draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    return np.asarray(image)


def test_checker_agrees_with_rendered_captions():
    rng = np.random.default_rng(0)
    wrong = []
    for i in range(5000):
        pool = shapes.captions(DRAWN[i % len(DRAWN)])
        caption = pool[int(rng.integers(len(pool)))]
        verdict = shapes.check(caption, shapes.render(caption, rng))
        if verdict.strict != 1.0:
            wrong.append((caption, verdict))
    assert len(wrong) <= 25, wrong[:5]  # 99.5 %


def test_words_are_read_by_ocr():
    rng = np.random.default_rng(1)
    words = shapes.captions("words")[:60:4]
    verdicts = [shapes.check(caption, shapes.render(caption, rng)) for caption in words]
    assert np.mean([v.strict for v in verdicts]) >= 0.9, verdicts
    other = shapes.check('a sign that says "QUIZ"', shapes.render('a sign that says "HOME"', rng))
    assert other.strict == 0.0
    assert other.dense < 0.5


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_noise_and_blank_score_nothing(family):
    rng = np.random.default_rng(2)
    pictures = [np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 250)]
    pictures += [rng.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(4)]
    pictures += [np.kron(rng.integers(0, 256, (16, 16, 3)), np.ones((4, 4, 1))).astype(np.uint8)]
    for picture in pictures:
        verdict = shapes.check(shapes.captions(family)[0], picture)
        assert (verdict.strict, verdict.dense) == (0.0, 0.0), verdict


RED, BLUE = ("circle", "red", 16, 16, 8), ("square", "blue", 46, 46, 8)


@pytest.mark.parametrize(
    ("caption", "things", "strict"),
    [
        ("a red circle and a blue square", [RED, BLUE], 1),
        ("a blue circle and a red square", [RED, BLUE], 0),
        ("a photo of a circle and a square", [RED, BLUE], 1),
        ("a circle", [RED, BLUE], 0),
        (
            "a circle above a square",
            [("circle", "red", 32, 12, 8), ("square", "red", 32, 48, 8)],
            1,
        ),
        (
            "a circle below a square",
            [("circle", "red", 32, 12, 8), ("square", "red", 32, 48, 8)],
            0,
        ),
        (
            "a square left of a circle",
            [("square", "red", 12, 30, 8), ("circle", "red", 48, 32, 8)],
            1,
        ),
        (
            "a circle left of a square",
            [("square", "red", 12, 30, 8), ("circle", "red", 48, 32, 8)],
            0,
        ),
        ("two red circles", [RED, ("circle", "red", 46, 16, 8)], 1),
        ("two red circles", [RED, ("circle", "blue", 46, 16, 8)], 0),
        ("three red circles", [RED, ("circle", "red", 46, 16, 8)], 0),
        ("one circle", [RED], 1),
    ],
)
def test_strict_verdicts_on_known_scenes(caption, things, strict):
    verdict = shapes.check(caption, scene(*things))
    assert verdict.strict == strict, verdict
    assert 0.0 < verdict.dense <= 1.0
    assert (verdict.dense == 1.0) == (strict == 1)


@pytest.mark.parametrize(("lobes", "depth"), [(2, 0.15), (3, 0.1), (4, 0.1), (5, 0.15)])
def test_a_wobbly_blob_is_no_circle(lobes, depth):
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    for radius, passes in ((48 + 0 * angle, 1), (48 * (1 + depth * np.cos(lobes * angle)), 0)):
        canvas = Image.new("RGB", (256, 256), (250, 250, 250))
        outline = zip(128 + radius * np.cos(angle), 128 + radius * np.sin(angle), strict=True)
        ImageDraw.Draw(canvas).polygon(list(outline), fill=shapes.COLOURS["red"])
        picture = np.asarray(canvas.resize((64, 64), Image.Resampling.BOX))
        assert shapes.check("a red circle", picture).strict == passes


def test_dense_score_rises_with_every_clause():
    caption = "four green squares"
    spots = [(14, 14), (50, 14), (14, 50), (50, 50)]
    scores = [
        shapes.check(caption, scene(*[("square", "green", x, y, 8) for x, y in spots[:n]])).dense
        for n in (1, 2, 3, 4)
    ]
    assert scores == sorted(scores)
    assert scores[-1] == 1.0
    wrong_colour = shapes.check("a red square", scene(("square", "blue", 30, 30, 10))).dense
    wrong_shape = shapes.check("a red square", scene(("circle", "blue", 30, 30, 10))).dense
    assert wrong_shape < wrong_colour < 1.0


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_captions_parse_to_their_family(family):
    for caption in shapes.captions(family):
        found = shapes.parse(caption).family
        assert found == family


@pytest.mark.parametrize("caption", ["a dog", "six circles", "a red", "", 'a sign that says "cat"'])
def test_other_captions_are_refused(caption):
    with pytest.raises(ConfigError, match="not of the embedded world"):
        shapes.parse(caption)


def test_pictures_of_another_kind_are_refused():
    with pytest.raises(ConfigError, match=r"uint8 \[H, W, 3\]; got float64 \[64, 64\]"):
        shapes.check("a circle", np.zeros((64, 64)))


def test_what_is_no_shape_spoils_a_picture():
    right = scene(("circle", "red", 20, 20, 12))
    assert shapes.check("a red circle", right).strict == 1
    dark = right.copy()
    dark[50:60, 50:60] = 0  # a fifth of what is there, and no colour
    assert shapes.check("a red circle", dark).strict == 0
    smear = scene(("circle", "red", 20, 20, 15)).copy()
    smear[56:60, 40:52] = shapes.COLOURS["blue"]  # 6 % of what is there, and no shape
    assert shapes.check("a red circle", smear).strict == 0


def test_two_circles_of_unlike_colours_are_two_things_of_one_each():
    picture = scene(RED, ("circle", "green", 46, 46, 8))
    assert shapes.check("a red circle and a green circle", picture).strict == 1
