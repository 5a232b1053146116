"""GenEval's language: six tasks of prompts, what each asks for, and the published 553.

A prompt is a conjunction of clauses: "include" at least n objects of a class (in a colour, in a
place), "exclude" m or more of one. Source: Ghosh et al., GenEval, NeurIPS 2023, and the prompts and
metadata published with it. The embedded world's captions (shapes.py) are of the same language over
other classes. How pictures are judged: rewards/geneval.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import ConfigError, closest

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# COCO's 80 classes in COCO's order, in the words that GenEval uses for them.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_MIRRORED = {"right of": "left of", "below": "above"}
_SEED, _PER_TASK = 43, 100  # of the published prompts; repeated draws leave 553
TRAIN_SIZE = 10_000  # at most, per task: two tasks have 25,280 and 554,580 prompts


@dataclass(frozen=True)
class Clause:
    """`count` objects of class `name`; `colour` of each of them or None.

    `position`: a relation, and the index among the included clauses of what it refers to.
    """

    name: str
    count: int = 1
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Spec:
    """What a prompt asks for: `count` or more of each included clause, fewer of each excluded."""

    prompt: str
    task: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def parse(prompt: str, classes: tuple[str, ...] = CLASSES) -> Spec:
    """Read a prompt of GenEval's six templates, with or without its leading "a photo of".

    The templates: "a C", "a C and a C", "N Cs", "a COLOUR C", "a C RELATION a C", "a COLOUR C and a
    COLOUR C"; also coloured things wherever there are plain ones. A number asks for exactly as
    many, an article for at least one. Raises ConfigError for another prompt, and for a class that
    is not among `classes`.
    """
    body = prompt.strip().removeprefix("a photo of ").rstrip(".")
    for word in (*RELATIONS, "and"):
        left, join, right = body.partition(f" {word} ")
        if join:
            return _pair(prompt, word, _thing(left, classes), _thing(right, classes))
    thing, counted = _thing(body, classes)
    plain = "colors" if thing.colour else "single_object"
    return Spec(prompt, "counting" if counted else plain, (thing,), _exclude((thing, counted)))


def from_metadata(entry: Mapping[str, Any]) -> Spec:
    """Read one object of GenEval's evaluation_metadata.jsonl. Raises ConfigError naming the entry.

    {"tag", "prompt", "include": [{"class", "count", "color", "position": [relation, index]}],
    "exclude": [{"class", "count"}]}; "color", "position" and "exclude" may be absent.
    """
    try:
        include = tuple(map(_clause, entry["include"]))
        exclude = tuple(map(_clause, entry.get("exclude", ())))
        spec = Spec(str(entry.get("prompt", "")), entry["tag"], include, exclude)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"not an entry of GenEval's metadata: {entry!r} ({error!r})") from error
    targets = [clause.position for clause in include if clause.position]
    if any(not 0 <= index < len(include) for _, index in targets) or spec.task not in TASKS:
        raise ConfigError(f"GenEval metadata with an unknown tag or position target: {entry!r}")
    return spec


@lru_cache
def prompts(task: str, split: str = "all") -> tuple[str, ...]:
    """Prompts of one task: `test` are the published ones, `train` others, `all` both.

    The test split has 80, 99, 80, 94, 100 and 100 prompts in the order of `TASKS`. The train split
    has no prompt that means the same as a test prompt, in whatever order it names the things, so
    none of `single_object`, whose 80 prompts are all published; it is drawn once and for all, at
    most `TRAIN_SIZE` per task. Raises ConfigError for an unknown task or split.
    """
    if task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    if split not in ("all", "train", "test"):
        raise ConfigError(f"split must be all, train or test; got {split!r}")
    test = published()[task]
    if split == "test":
        return test
    seen = {_meaning(parse(prompt)) for prompt in test}
    train = []
    for prompt in _candidates(task):
        meaning = _meaning(parse(prompt))
        if meaning not in seen:
            seen.add(meaning)
            train.append(prompt)
        if len(train) == TRAIN_SIZE:
            break
    return tuple(train) if split == "train" else (*test, *train)


@lru_cache
def published() -> dict[str, tuple[str, ...]]:
    """The 553 evaluation prompts by task, from the draws that made them (numpy seed 43)."""
    rng = np.random.default_rng(_SEED)
    drawn = {"single_object": [_single(i) for i in rng.choice(80, size=80, replace=False)]}
    for task, draw in _DRAWS.items():
        drawn[task] = [draw(rng) for _ in range(_PER_TASK)]
    return {task: tuple(dict.fromkeys(drawn[task])) for task in TASKS}


def holds(box_a: Sequence[float], relation: str, box_b: Sequence[float]) -> bool:
    """Is A `relation` B? Boxes are (x0, y0, x1, y1) in pixels, y grows down.

    The centre offset loses 0.1 of both sizes in each direction; of what is left, the share of the
    offset's length in the asked direction exceeds 0.5.
    """
    a, b = np.asarray(box_a, float), np.asarray(box_b, float)
    offset = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    sizes = (a[2:] - a[:2]) + (b[2:] - b[:2])
    revised = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
    if np.abs(revised).max() < 1e-3:
        return False
    x, y = revised / np.linalg.norm(offset)
    along = {"left of": -x, "right of": x, "above": -y, "below": y}
    return bool(along[relation] > 0.5)


def _pair(prompt: str, word: str, left: tuple[Clause, bool], right: tuple[Clause, bool]) -> Spec:
    first, second = left[0], right[0]
    exclude = _exclude(left, right)
    if word in RELATIONS:  # the place is the first thing's, and what it refers to comes before it
        placed = Clause(first.name, first.count, first.colour, (word, 0))
        return Spec(prompt, "position", (second, placed), exclude)
    task = "color_attr" if first.colour or second.colour else "two_object"
    return Spec(prompt, task, (first, second), exclude)


def _exclude(*things: tuple[Clause, bool]) -> tuple[Clause, ...]:
    """One more than a number says is too many."""
    return tuple(Clause(thing.name, thing.count + 1) for thing, counted in things if counted)


def _thing(text: str, classes: tuple[str, ...]) -> tuple[Clause, bool]:
    """The clause of "a red bus" or "two buses", and whether a number was named."""
    number, _, rest = text.partition(" ")
    if number in ("a", "an"):
        count, plural = 1, False
    elif number in NUMBERS:
        count, plural = NUMBERS.index(number) + 1, number != "one"
    else:
        raise ConfigError(f"prompt part {text!r} is not of GenEval's form, e.g. 'two red apples'")
    nouns = _nouns(classes, plural)
    if rest in nouns:  # "an orange" is a class before it is a colour
        return Clause(nouns[rest], count), number in NUMBERS
    colour, _, noun = rest.partition(" ")
    if colour in COLOURS and noun in nouns:
        return Clause(nouns[noun], count, colour), number in NUMBERS
    noun = noun if colour in COLOURS else rest
    raise ConfigError(f"prompt part {text!r}: unknown class {noun!r}.{closest(noun, nouns)}")


@lru_cache
def _nouns(classes: tuple[str, ...], plural: bool) -> dict[str, str]:
    """What a prompt calls a class -> the class."""
    return {_plural(name) if plural else name: name for name in classes}


def _clause(entry: Mapping[str, Any]) -> Clause:
    position = entry.get("position")
    if position is not None:
        relation, index = position
        if relation not in RELATIONS:
            raise ValueError(f"relation {relation!r}")
        position = (relation, int(index))
    count, colour = int(entry["count"]), entry.get("color")
    if count < 1 or colour not in (None, *COLOURS):
        raise ValueError(f"count {count}, colour {colour!r}")
    return Clause(str(entry["class"]), count, colour, position)


def _meaning(spec: Spec) -> tuple:
    """Equal for prompts that ask for the same picture, whichever thing they name first."""
    things = [(c.name, c.count, c.colour or "") for c in spec.include]
    relation = spec.include[-1].position
    if relation is None:
        return tuple(sorted(things))
    word = relation[0]
    if word in _MIRRORED:
        things, word = things[::-1], _MIRRORED[word]
    return (*things, word)


def _article(text: str) -> str:
    return f"an {text}" if text[0] in "aeiou" else f"a {text}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"  # "benchs": the published spelling


def _single(index: int) -> str:
    return f"a photo of {_article(CLASSES[index])}"


def _two(a: int, b: int) -> str:
    return f"a photo of {_article(CLASSES[a])} and {_article(CLASSES[b])}"


def _counting(index: int, count: int) -> str:
    return f"a photo of {NUMBERS[count - 1]} {_plural(CLASSES[index])}"


def _coloured(index: int, colour: int) -> str:
    return f"a photo of {_article(COLOURS[colour])} {CLASSES[index]}"


def _position(a: int, b: int, relation: int) -> str:
    return f"a photo of {_article(CLASSES[a])} {RELATIONS[relation]} {_article(CLASSES[b])}"


def _attribution(a: int, b: int, p: int, q: int) -> str:
    first = f"{_article(COLOURS[p])} {CLASSES[a]}"
    return f"a photo of {first} and {_article(COLOURS[q])} {CLASSES[b]}"


def _draw_position(rng: np.random.Generator) -> str:
    a, b = rng.choice(80, size=2, replace=False)
    return _position(a, b, rng.choice(4))


# One draw of each task but the first. The order of calls is the published one, which is what makes
# seed 43 give the published prompts; a person (class 0) has no colour.
_DRAWS: dict[str, Callable[[np.random.Generator], str]] = {
    "two_object": lambda rng: _two(*rng.choice(80, size=2, replace=False)),
    "counting": lambda rng: _counting(rng.choice(80), int(rng.integers(2, 4, endpoint=True))),
    "colors": lambda rng: _coloured(rng.choice(79) + 1, rng.choice(10)),
    "position": _draw_position,
    "color_attr": lambda rng: _attribution(
        *(rng.choice(79, size=2, replace=False) + 1), *rng.choice(10, size=2, replace=False)
    ),
}


# The same prompts by the numbers they are made of, to be drawn without repetition.
_GRIDS: dict[str, tuple[tuple[int, ...], Callable[..., str]]] = {
    "two_object": ((80, 80), _two),
    "counting": ((80, 3), lambda i, n: _counting(i, n + 2)),
    "colors": ((79, 10), lambda i, c: _coloured(i + 1, c)),
    "position": ((80, 80, 4), _position),
    "color_attr": ((79, 79, 10, 10), lambda a, b, p, q: _attribution(a + 1, b + 1, p, q)),
}


def _candidates(task: str) -> Iterator[str]:
    """Every prompt of a task in a fixed random order; none where the test split has them all."""
    if task not in _GRIDS:
        return
    grid, write = _GRIDS[task]
    rng = np.random.default_rng((_SEED, TASKS.index(task)))
    for number in rng.permutation(math.prod(grid)):
        place = [int(i) for i in np.unravel_index(number, grid)]
        pairs = [
            place[i : i + 2] for i in (0, 2) if grid[i : i + 2] in ((80, 80), (79, 79), (10, 10))
        ]
        if all(a != b for a, b in pairs):  # two things, two colours
            yield write(*place)
