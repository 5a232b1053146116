"""Prompts that ask for text in a picture: `a photo of a road sign that says "Mind the Gap"`.

The families are lengths of the text: "word" (one), "phrase" (two or three words) and "line" (four
or more). A text has at most 29 characters, like the longest of the field's prompt set, and stands
in double quotes, where rewards/ocr.py looks for it. Texts and scenes are composed here; no text of
the test split, in whatever case, is in the training split.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import numpy as np

from .errors import ConfigError, closest

FAMILIES = ("word", "phrase", "line")
MAX_LENGTH = 29
TRAIN_SIZE, TEST_SIZE = 4000, 200  # prompts per family
_SEED = 11
_THINGS = (
    "Bread", "Coffee", "Books", "Flowers", "Music", "Garden", "Pizza", "Bicycles", "Museum",
    "Honey", "Library", "Tickets", "Harbour", "Bridge", "Market", "Pottery", "Cheese", "Station",
    "Gallery", "Candles", "Theatre", "Tea", "Oranges", "Lanterns", "Pancakes", "Records", "Clocks",
    "Hats", "Piano", "Kitchen", "Workshop", "Orchard", "Windmill", "Island", "River", "Mountain",
    "Rocket", "Robots", "Dragons", "Pirates", "Planets", "Penguins", "Tigers", "Owls", "Whales",
    "Kittens", "Puzzles", "Postcards", "Umbrellas", "Balloons", "Chess", "Maps", "Soup", "Noodles",
    "Mangoes", "Skates", "Violins", "Cameras", "Lemonade", "Strawberries", "Chocolate",
    "Telescopes", "Marbles", "Sandwiches", "Compass", "Lighthouse", "Airport", "Laundry",
    "Pharmacy", "School", "Stadium",
)  # fmt: skip
_WORDS = _THINGS + (
    "Exit", "Open", "Closed", "Danger", "Welcome", "Quiet", "Push", "Pull", "Sale", "Private",
    "Free", "Caution", "Detour", "Slow", "Stop", "Hello", "Dream", "Courage", "Future", "Freedom",
    "Victory", "Peace", "Forever", "Adventure", "Imagine", "Believe", "Breathe", "Wonder",
    "Harmony", "Thunder", "Vacancy", "Taxi", "Parking", "Reception", "Elevator", "Arrivals",
    "Departures", "Information", "Grand", "Classic", "Fragile", "Organic", "Reserved", "Emergency",
    "Celebration", "Breakfast",
)  # fmt: skip
_QUALITIES = (
    "Fresh", "Old", "Golden", "Silent", "Wild", "Little", "Royal", "Magic", "Hidden", "Happy",
    "Blue", "Green", "Famous", "Midnight", "Secret", "Northern", "Velvet", "Sunny", "Brave",
    "Paper", "Electric", "Crystal", "Rusty", "Broken", "Perfect", "Winter", "Summer", "Second",
    "Best", "Lost",
)  # fmt: skip
_PLACES = (
    "Town", "Home", "Paris", "Mars", "the Moon", "the Zoo", "the Sea", "the City", "Wonderland",
    "the Future", "the Jungle", "Tokyo", "the Farm", "the Club", "the Circus", "the Beach",
)  # fmt: skip
_DEEDS = (
    "Love", "Feed", "Save", "Wash", "Follow", "Protect", "Remember", "Count", "Paint", "Trust",
    "Visit", "Respect", "Share", "Hide", "Bring", "Sell",
)  # fmt: skip
_SCENES = (
    "a road sign that says", "a wooden sign in a forest that says",
    "a neon sign at night that reads", "a shop window with the words",
    "a chalkboard in front of a cafe that says", "a birthday cake with the words",
    "a white t-shirt printed with", "a book cover titled", "a street poster with the words",
    "a coffee mug with the text", "a movie poster titled", "a brick wall with graffiti that says",
    "a laptop screen showing the text", "a billboard beside a highway that says",
    "a newspaper with the headline", "a train station display that shows", "a ship with the name",
    "a handwritten note that says", "a stone plaque engraved with", "a cardboard box labelled",
    "a flag with the words", "a license plate frame that says", "a cinema marquee that reads",
    "a robot holding a sign that says", "a cat wearing a tag that says",
    "a beach with letters in the sand that spell", "a train carriage painted with",
    "a greeting card that says", "a bottle with a label that reads", "a protest banner that says",
    "a door mat with the words", "a cloudy sky where smoke spells", "an old map titled",
    "a classroom board that says", "a smartphone showing the message",
    "a racing car with the words", "a bakery box stamped with", "a museum label that reads",
    "a hot air balloon with the text", "a snowy field with a sign that says",
)  # fmt: skip


@lru_cache(maxsize=8)
def prompts(family: str, split: str = "all") -> tuple[str, ...]:
    """The prompts of one family: 4000 to train on, 200 to test on, or "all" of them.

    Raises ConfigError for an unknown family or split.
    """
    _check("family", family, FAMILIES)
    _check("split", split, ("train", "test", "all"))
    found = {text for text in _texts(family) if len(text) <= MAX_LENGTH}
    texts = sorted(text for text in found if _family(text) == family)
    rng = np.random.default_rng((_SEED, FAMILIES.index(family)))
    texts = [texts[i] for i in rng.permutation(len(texts))]
    num_test = len(texts) // 10
    test = _compose(texts[:num_test], TEST_SIZE, rng)
    train = _compose(texts[num_test:], TRAIN_SIZE, rng)
    return {"train": train, "test": test, "all": train + test}[split]


def family_of(prompt: str) -> str:
    """The family that the text in a prompt's double quotes belongs to, whoever wrote the prompt.

    Raises ConfigError for a prompt without such a text.
    """
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].strip():
        raise ConfigError(f"prompt {prompt!r} has no text in double quotes")
    return _family(parts[1])


def _family(text: str) -> str:
    num_words = len(text.split())
    return FAMILIES[0 if num_words == 1 else 1 if num_words < 4 else 2]


def _texts(family: str) -> Iterator[str]:
    """Texts in title case, those of the family among them."""
    if family == "word":
        yield from _WORDS
    elif family == "phrase":
        for quality, thing in product(_QUALITIES, _THINGS):
            yield f"{quality} {thing}"
            yield f"The {quality} {thing}"
        for thing, place in product(_THINGS, _PLACES):
            yield f"{thing} of {place}"
    else:
        for deed, quality, thing in product(_DEEDS, _QUALITIES, _THINGS):
            yield f"{deed} the {quality} {thing}"
        for thing, place in product(_THINGS, _PLACES):
            yield f"{thing} from {place}"
            yield f"No {thing} Beyond {place}"


def _compose(texts: list[str], size: int, rng: np.random.Generator) -> tuple[str, ...]:
    """`size` different prompts, every text equally often, in a scene and a case drawn for it."""
    found: dict[str, None] = {}
    for turn in range(size * 100):
        text = texts[turn % len(texts)]
        scene, case = _SCENES[rng.integers(len(_SCENES))], rng.integers(4)
        text = text.upper() if case == 0 else text.lower() if case == 1 else text
        found[f'a photo of {scene} "{text}"'] = None
        if len(found) == size:
            break
    return tuple(found)


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name} must be one of {', '.join(allowed)}; got {value!r}.{closest(value, allowed)}"
        )
