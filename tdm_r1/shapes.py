"""The embedded world: caption -> picture, picture -> verdict.

Captions follow GenEval's families (single object, two objects, counting, colours, position, colour
attribution) plus short words on a sign. `render` draws a caption; `check` sees nothing but pixels:
it segments by hue, fits each segment to a shape template, and compares what it found with what the
caption asks for. Words are read by an OCR engine. Pictures are uint8 `[H, W, 3]`, RGB, 64 x 64.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .errors import ConfigError
from .geneval import holds

SIZE = 64  # pixels
COLOURS = {
    "red": (222, 45, 40),
    "green": (40, 165, 70),
    "blue": (45, 85, 225),
    "yellow": (245, 205, 35),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("one", "two", "three", "four", "five")
WORDS = tuple(
    "GO NO UP ON IN OK HI WE MY BE CAT DOG SUN CAR BUS TEA ICE RED BIG TOP ZOO HOT ART FLY JAM KEY "
    "MAP NET OWL PIE BOX VAN WAX FOX STOP OPEN EXIT SALE TAXI CAFE PARK FISH MILK BOOK GOLD HOME "
    "JAZZ KIWI LOVE MOON NEXT PLAY QUIZ RAIN SHOP TREE UNIT VOTE WAVE YEAR ZONE WIND".split()
)
NUM_FOLDS = 4
SPLITS = (
    "all", "train", "test", *(f"{part}/{k}" for part in ("train", "test") for k in range(NUM_FOLDS))
)  # fmt: skip
FAMILIES = ("single", "two", "counting", "colours", "position", "attribution", "words")
_SUPERSAMPLE = 4
_GRID = (12, 22, 32, 42, 52)  # pixels; centres lie on it in both directions
_RADII = {1: (12, 15), 2: (10,), 3: (8,)}  # pixels, by the number of objects (3: or more)
CLEAN = 0.9  # of the foreground lies in shapes, or a picture is not clean
_MIN_AREA = 10  # pixels; smaller specks are anti-aliasing, not objects
# Segment against template. A drawn shape has 0.94 or more, an autoencoder rounds its corners off: a
# triangle's most, a circle has none. Below these a blob is a blob.
_MIN_IOU = {"circle": 0.86, "square": 0.86, "triangle": 0.7}


@dataclass(frozen=True)
class Thing:
    """`count` objects of one shape; `colour` None means any colour."""

    shape: str
    colour: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Caption:
    """A parsed caption: the things asked for, a relation of the first to the second, or a word."""

    text: str
    family: str
    things: tuple[Thing, ...] = ()
    relation: str | None = None
    word: str | None = None


@dataclass(frozen=True)
class Detection:
    """One segment: shape None if it fits no template. `box` is (x0, y0, x1, y1) in pixels."""

    shape: str | None
    colour: str
    box: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class Verdict:
    """`strict` is 0.0 or 1.0, `dense` in [0, 1]; `detail` says what was seen."""

    strict: float
    dense: float
    detail: str


# Captions


def _noun(thing: Thing) -> str:
    name = f"{thing.colour} {thing.shape}" if thing.colour else thing.shape
    return f"a {name}" if thing.count == 1 else f"{NUMBERS[thing.count - 1]} {name}s"


def _pairs() -> list[tuple[str, str]]:
    return [(a, b) for a in SHAPES for b in SHAPES if a != b]


@lru_cache
def captions(family: str, split: str = "all") -> tuple[str, ...]:
    """All captions of a family, or of its quarters in the order of a hash one or the others.

    "test" is the first quarter and "train" the others; "test/K" is quarter K, 0 to 3, and "train/K"
    the others: with each K in turn, every caption is held out once. Raises ConfigError for an
    unknown family or split.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if family == "single":
        texts = [_noun(Thing(s)) for s in SHAPES]
    elif family == "colours":
        texts = [_noun(Thing(s, c)) for s in SHAPES for c in COLOURS]
    elif family == "counting":
        plain = [f"{NUMBERS[n - 1]} {s}{'s' if n > 1 else ''}" for n in range(1, 6) for s in SHAPES]
        texts = plain + [
            _noun(Thing(s, c, n)) for n in range(2, 6) for s in SHAPES for c in COLOURS
        ]
    elif family == "two":
        texts = [f"{_noun(Thing(a))} and {_noun(Thing(b))}" for a, b in _pairs()]
    elif family == "position":
        texts = [f"{_noun(Thing(a))} {r} {_noun(Thing(b))}" for a, b in _pairs() for r in RELATIONS]
    elif family == "attribution":
        texts = [
            f"{_noun(Thing(a, p))} and {_noun(Thing(b, q))}"
            for a, b in _pairs()
            for p in COLOURS
            for q in COLOURS
            if p != q
        ]
    else:
        texts = [f'a sign that says "{w}"' for w in WORDS]
    if split == "all":
        return tuple(texts)
    order = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    part, _, k = split.partition("/")
    first, end = (fold * len(texts) // NUM_FOLDS for fold in (int(k or 0), int(k or 0) + 1))
    test = set(order[first:end])
    return tuple(text for text in texts if (text in test) == (part == "test"))


_THING = re.compile(
    rf"(?P<n>an?|{'|'.join(NUMBERS)}) (?:(?P<c>{'|'.join(COLOURS)}) )?(?P<s>{'|'.join(SHAPES)})s?"
)
_SIGN = re.compile(r'a sign that says "([A-Z]{1,8})"')
_JOIN = re.compile(rf" (and|{'|'.join(RELATIONS)}) ")


def _thing(text: str) -> Thing:
    match = _THING.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"caption part {text!r} is not of the embedded world, e.g. 'two red circles'"
        )
    number = match["n"]
    count = NUMBERS.index(number) + 1 if number in NUMBERS else 1
    return Thing(match["s"], match["c"], count)


@lru_cache(maxsize=4096)
def parse(text: str) -> Caption:
    """Read a caption of the world, with or without a leading "a photo of". Raises ConfigError."""
    body = text.strip().removeprefix("a photo of ").rstrip(".")
    sign = _SIGN.fullmatch(body)
    if sign:
        return Caption(text, "words", word=sign[1])
    join = _JOIN.search(body)
    if join is None:
        thing = _thing(body)
        counted = thing.count > 1 or body.startswith("one ")
        family = "counting" if counted else "colours" if thing.colour else "single"
        return Caption(text, family, (thing,))
    things = (_thing(body[: join.start()]), _thing(body[join.end() :]))
    if join[1] != "and":
        return Caption(text, "position", things, relation=join[1])
    coloured = things[0].colour or things[1].colour
    return Caption(text, "attribution" if coloured else "two", things)


# Renderer


def render(caption: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a caption as uint8 `[64, 64, 3]`; free attributes (place, size, hue) come from rng."""
    spec = parse(caption)
    canvas = Image.new("RGB", (SIZE * _SUPERSAMPLE,) * 2, (int(rng.integers(236, 256)),) * 3)
    draw = ImageDraw.Draw(canvas)
    if spec.word is not None:
        _draw_sign(draw, spec.word, rng)
    else:
        _draw_things(draw, spec, rng)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def _draw_things(draw: ImageDraw.ImageDraw, spec: Caption, rng: np.random.Generator) -> None:
    shapes, colours = [], []
    for thing in spec.things:
        shapes += [thing.shape] * thing.count
        colours += [thing.colour or str(rng.choice(list(COLOURS)))] * thing.count
    places = _places(len(shapes), spec.relation, rng)
    for shape, colour, (x, y, r) in zip(shapes, colours, places, strict=True):
        fill = tuple(
            int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255)
        )
        _draw_shape(draw, shape, fill, x, y, r, _SUPERSAMPLE)


def _places(
    n: int, relation: str | None, rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """n centres on the world's grid and one radius each, in pixels; the relation holds clearly."""
    radii = _RADII[min(n, 3)]
    placed: list[tuple[float, float, float]] = []
    tries = 0
    while len(placed) < n:
        tries += 1
        if tries % 64 == 0:  # a corner nobody fits into any more
            placed.clear()
        r = float(rng.choice(radii))
        x, y = (float(v) for v in rng.choice(_GRID, 2))
        if min(x, y) < r + 2 or max(x, y) > SIZE - r - 2:
            continue
        if any(max(abs(x - u), abs(y - v)) < r + q + 3.0 for u, v, q in placed):
            continue
        if relation and placed and _margin(placed[0][0] - x, placed[0][1] - y, relation) <= 6.0:
            continue
        placed.append((x, y, r))
    return placed


def _margin(x: float, y: float, relation: str) -> float:
    """How many pixels the asked direction exceeds the other axis of an offset; y grows down."""
    along = {"left of": -x, "right of": x, "above": -y, "below": y}[relation]
    return along - (abs(y) if relation in ("left of", "right of") else abs(x))


def _draw_shape(draw, shape: str, fill, x: float, y: float, r: float, scale: float) -> None:
    box = [(x - r) * scale, (y - r) * scale, (x + r) * scale, (y + r) * scale]
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon([(x * scale, box[1]), (box[2], box[3]), (box[0], box[3])], fill=fill)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # the typeface Pillow carries: the same on every machine


def _draw_sign(draw: ImageDraw.ImageDraw, word: str, rng: np.random.Generator) -> None:
    s = _SUPERSAMPLE
    y = 28 * s
    ink = tuple(int(v) for v in rng.integers(15, 50, 3))
    draw.rectangle([30 * s, y, 34 * s, SIZE * s], fill=(130, 130, 130))
    draw.rounded_rectangle(
        [3 * s, y - 15 * s, 61 * s, y + 15 * s], 4 * s, (250, 250, 250), ink, 2 * s
    )
    size = 22 * s
    while draw.textlength(word, font=_font(size)) > 50 * s:
        size -= s
    draw.text(
        (32 * s, y),
        word,
        fill=ink,
        font=_font(size),
        anchor="mm",
        stroke_width=s // 2,
        stroke_fill=ink,
    )


# Checker


@lru_cache
def _template(shape: str, width: int, height: int) -> np.ndarray:
    canvas = Image.new("L", (width * 8, height * 8))
    draw = ImageDraw.Draw(canvas)
    if shape == "circle":
        draw.ellipse([0, 0, width * 8 - 1, height * 8 - 1], fill=255)
    elif shape == "square":
        draw.rectangle([0, 0, width * 8, height * 8], fill=255)
    else:
        draw.polygon([(width * 4, 0), (width * 8, height * 8), (0, height * 8)], fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) > 127


def _classify(mask: np.ndarray) -> str | None:
    """The template of greatest IoU with a segment cut to its box, None below its `_MIN_IOU`."""
    height, width = mask.shape
    if not 0.77 <= width / height <= 1.3:
        return None
    scores = {}
    for shape in SHAPES:
        template = _template(shape, width, height)
        scores[shape] = (mask & template).sum() / (mask | template).sum()
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] >= _MIN_IOU[best] else None


def detect(image: np.ndarray) -> tuple[list[Detection], float]:
    """Segments of a picture by hue, and the share of non-background pixels in fitting shapes.

    image: uint8 `[H, W, 3]`. Background is any light grey; dark grey is foreground of no colour.
    """
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ConfigError(f"image must be uint8 [H, W, 3]; got {image.dtype} {list(image.shape)}")
    pixels = image.astype(np.int32)
    chroma = pixels.max(-1) - pixels.min(-1)
    coloured = chroma > 70
    dark = (~coloured) & (pixels.max(-1) < 150)
    hue = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 0].astype(np.int32) * 2  # degrees
    centres = np.array([_hue(c) for c in COLOURS.values()])
    distance = np.abs((hue[..., None] - centres + 180) % 360 - 180)
    label = np.where(coloured, distance.argmin(-1) + 1, 0)
    found, good = [], 0
    for index, colour in enumerate(COLOURS, start=1):
        count, parts, stats, _ = cv2.connectedComponentsWithStats((label == index).astype(np.uint8))
        for part in range(1, count):
            x, y, w, h, area = (int(v) for v in stats[part])
            if area < _MIN_AREA:
                continue
            shape = _classify(parts[y : y + h, x : x + w] == part)
            found.append(Detection(shape, colour, (x, y, x + w, y + h), area))
            good += area if shape else 0
    foreground = int(coloured.sum() + dark.sum())
    return found, good / foreground if foreground else 0.0


def _hue(rgb: Sequence[int]) -> float:
    return float(cv2.cvtColor(np.array([[rgb]], np.uint8), cv2.COLOR_RGB2HSV)[0, 0, 0]) * 2


def check(
    caption: str, image: np.ndarray, read: Callable[[np.ndarray], str] | None = None
) -> Verdict:
    """Does the picture show its caption?

    strict: 1 if every thing asked for is there in its exact number, colour and place and nothing
    else is. dense: mean over clauses in [0, 1] (number of each thing, colour, relation, nothing
    extra) times the share of the foreground that is clean shapes; words: 1 - distance / length.
    `read` reads text (words only; default: the package's OCR reader). Raises ConfigError for a
    caption outside the world or a picture that is not uint8 `[H, W, 3]`.
    """
    spec = parse(caption)
    if spec.word is not None:
        return _check_word(spec.word, image, read)
    found, clean = detect(image)
    shapes = [d for d in found if d.shape]
    seen = ", ".join(f"{d.colour} {d.shape or '?'}" for d in found) or "nothing"
    if not shapes or clean < 0.5:
        return Verdict(0.0, 0.0, seen)
    clauses, used = [], 0
    for thing in spec.things:
        kind = [d for d in shapes if d.shape == thing.shape]
        exact = [d for d in kind if thing.colour in (None, d.colour)]
        used += min(len(exact), thing.count)
        clauses.append(_closeness(len(exact), thing.count))
        if thing.colour:
            alike = sum(t.count for t in spec.things if t.shape == thing.shape)
            clauses.append(_closeness(len(kind), alike))
    clauses.append(1.0 / (1.0 + len(found) - used))
    if spec.relation:
        first, second = ([d for d in shapes if d.shape == t.shape] for t in spec.things)
        clauses.append(
            float(any(holds(a.box, spec.relation, b.box) for a in first for b in second))
        )
    strict = float(all(c == 1.0 for c in clauses) and clean > CLEAN)
    return Verdict(strict, float(np.mean(clauses)) * clean, seen)


def _closeness(got: int, want: int) -> float:
    return max(0.0, 1.0 - abs(got - want) / want)


def _check_word(word: str, image: np.ndarray, read: Callable[[np.ndarray], str] | None) -> Verdict:
    from .rewards.ocr import levenshtein, read_text

    read = read_text if read is None else read
    big = cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    text = re.sub(r"[^A-Za-z]", "", read(big)).upper()
    if not text:
        return Verdict(0.0, 0.0, "no text")
    distance = levenshtein(word, text)
    return Verdict(float(distance == 0), 1.0 - min(distance, len(word)) / len(word), text)
