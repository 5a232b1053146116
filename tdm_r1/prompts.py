"""Prompts: where they come from, and a sampler whose position can be saved.

P prompts per iteration over all ranks, G samples each. A group is the G samples of one drawn
prompt; its id is the position of the draw, so the same text drawn twice makes two groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import geneval, shapes, signs
from .errors import ConfigError

# name -> (family, split) -> prompts
LANGUAGES = {"shapes": shapes.captions, "geneval": geneval.prompts, "ocr": signs.prompts}


def load_prompts(
    source: str,
    families: Sequence[str] = (),
    split: str = "all",
    *,
    key: str = "prompts.source",
) -> tuple[tuple[str, ...], ...]:
    """Prompts by family. `source`: "shapes" (the embedded world), "geneval" (its tasks are the
    families, its published prompts the test split), "ocr" (text in double quotes; the families are
    its lengths) or a text file, one prompt a line, in UTF-8. `key` is the recipe's, for errors.

    Raises ConfigError for an unknown family, a file that is missing or not text, or no prompts.
    """
    if source in LANGUAGES:
        pools = tuple(LANGUAGES[source](family, split) for family in families)
        empty = [family for family, pool in zip(families, pools, strict=True) if not pool]
        if empty:
            raise ConfigError(f"families {', '.join(empty)} have no prompts in split {split!r}")
    else:
        path = Path(source)
        if not path.is_file():
            raise ConfigError(
                f"{key} must be one of {', '.join(LANGUAGES)}, or a text file; "
                f"{source!r} is neither"
            )
        pools = (tuple(line.strip() for line in read_lines(path, key) if line.strip()),)
    if not pools or not all(pools):
        raise ConfigError(f"no prompts in {source!r}: the prompt list is empty")
    return pools


def read_lines(path: Path, key: str) -> list[str]:
    """The lines of a text file in UTF-8; ConfigError, naming the recipe's `key`, for another."""
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{key}: {path}:{number} is not UTF-8: {error.reason}") from error
    return lines


class PromptSampler:
    """Draws prompts, families in turn and each family a shuffled pass at a time.

    Draw n is a pure function of (seed, n): `position` is the whole state, and every rank can
    compute every draw without talking to the others.
    """

    def __init__(self, pools: Sequence[Sequence[str]], seed: int) -> None:
        self.pools = [tuple(pool) for pool in pools]
        self.seed = seed
        self.position = 0

    def draw(self, num_prompts: int) -> list[tuple[int, str]]:
        """The next `num_prompts` (group id, prompt) pairs; group ids never repeat."""
        first, self.position = self.position, self.position + num_prompts
        return [(n, self._prompt(n)) for n in range(first, self.position)]

    def _prompt(self, n: int) -> str:
        family, turn = n % len(self.pools), n // len(self.pools)
        pool = self.pools[family]
        epoch, index = divmod(turn, len(pool))
        order = np.random.default_rng((self.seed, family, epoch)).permutation(len(pool))
        return pool[int(order[index])]


def evaluation_prompts(pools: Sequence[Sequence[str]], num_prompts: int) -> list[str]:
    """A fixed list of `num_prompts`, families in turn, each pool repeated as often as needed.

    0 means every prompt once, which is how GenEval's 553 are evaluated.
    """
    if num_prompts == 0:
        return [prompt for pool in pools for prompt in pool]
    return [
        pools[i % len(pools)][(i // len(pools)) % len(pools[i % len(pools)])]
        for i in range(num_prompts)
    ]
