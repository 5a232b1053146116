"""The GenEval reward: does the picture show the objects, numbers, colours and places asked for?

Source of the strict verdict: Ghosh et al., GenEval, NeurIPS 2023. What it takes from a detector,
and the colours it asks for, come from detectors.py and colours.py; the prompts' language and the
evaluation prompts from tdm_r1/geneval.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tdm_r1.geneval import Clause, Spec, from_metadata, holds, parse
from tdm_r1.rewards.colours import Colours, load_colours
from tdm_r1.rewards.detectors import Detected, Detector, load_detector

DETECTOR = "facebook/mask2former-swin-small-coco-instance"  # transformers' copy of GenEval's own
THRESHOLD = 0.3  # confidence; a detector counts reliably only what it is sure of:
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16  # of one class


@dataclass(frozen=True)
class GenEval:
    """A detector and a way of naming colours, as a reward."""

    detector: Detector
    colours: Colours
    only_strict: bool

    def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> list[float]:
        """B numbers in [0, 1]: `judge`'s dense values, or its strict ones as 0.0 and 1.0.

        What is asked for is read from the prompt, or from GenEval's own metadata entry where one
        is given. Raises ConfigError, before anything is detected, for a prompt outside GenEval's
        templates or a class that the detector does not know.
        """
        entries = metadata if metadata is not None else [None] * len(prompts)
        specs = [
            from_metadata(entry) if entry else parse(prompt, self.detector.labels)
            for prompt, entry in zip(prompts, entries, strict=True)
        ]
        values = []
        for image, spec, found in zip(images, specs, self.detector(images, THRESHOLD), strict=True):
            dense, strict = judge(spec, image, found, self.colours)
            values.append(float(strict) if self.only_strict else dense)
        return values

    def to(self, device: Any) -> None:
        """Move the models; the embedded world's checker and the vote of pixels are none."""
        for part in (self.detector, self.colours):
            if callable(move := getattr(part, "to", None)):
                move(device)


def dense(detector: str = DETECTOR, clip: str = "", device: str = "auto") -> GenEval:
    """Build the reward in [0, 1] that trains. `detector`: "shapes", a directory or a Hub id.

    `clip`: a CLIP model's directory or Hub id to name colours; "" takes the vote of pixels.
    """
    return GenEval(load_detector(detector, device), load_colours(clip, device), only_strict=False)


def strict(detector: str = DETECTOR, clip: str = "", device: str = "auto") -> GenEval:
    """Build the reward of 0 or 1 that GenEval reports; arguments as for `dense`."""
    return GenEval(load_detector(detector, device), load_colours(clip, device), only_strict=True)


def judge(
    spec: Spec, image: Image.Image, found: Sequence[Detected], colours: Colours
) -> tuple[float, bool]:
    """(dense, strict) of one picture; `found` sorted by confidence, most confident first.

    Of each class only the `MAX_OBJECTS` most confident are looked at, above 0.3, or 0.9 in
    counting. Dense is the mean over these terms, strict whether all are 1, which is GenEval's
    verdict:

        include n of a class          min(found, n) / n
          in a colour                 share of the n most confident that have it (absent: no)
          left of, ... another        share of pairs of the n and its target's most confident for
                                      which `holds`; 0 if either is short of its number
        exclude m of a class          1 if found < m, else m / (1 + found)
    """
    threshold = COUNTING_THRESHOLD if spec.task == "counting" else THRESHOLD
    objects: dict[str, list[Detected]] = {}
    for item in found:
        if item.score > threshold and len(objects.setdefault(item.label, [])) < MAX_OBJECTS:
            objects[item.label].append(item)
    terms = []
    for clause in spec.include:
        best = objects.get(clause.name, [])[: clause.count]
        terms.append(len(best) / clause.count)
        if clause.colour:
            terms.append(colours(image, best).count(clause.colour) / clause.count)
        if clause.position:
            relation, index = clause.position
            terms.append(_placed(clause, best, relation, spec.include[index], objects))
    for clause in spec.exclude:
        number = len(objects.get(clause.name, []))
        terms.append(1.0 if number < clause.count else clause.count / (1 + number))
    return float(np.mean(terms)), all(term == 1.0 for term in terms)


def _placed(
    clause: Clause,
    best: Sequence[Detected],
    relation: str,
    target: Clause,
    objects: Mapping[str, Sequence[Detected]],
) -> float:
    others = objects.get(target.name, [])[: target.count]
    if len(best) < clause.count or len(others) < target.count:
        return 0.0
    return float(np.mean([holds(a.box, relation, b.box) for a in best for b in others]))
