"""Rewards: what one is, how it is named in a recipe, and the one call that checks what it returns.

A reward is any callable `fn(images, prompts) -> B numbers`. A recipe names it by a spec:

    spec := term ("+" term)*        term := [weight "*"] name | [weight "*"] built "(" options ")"
    name := "shapes" | "shapes:strict" | "shapes:clean" | "ocr" | "ocr:exact" | "jpeg" | built
          | path/to/file.py:callable
    built := "geneval" | "geneval:strict" | "remote"
    options := key "=" value ("," key "=" value)*
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tdm_r1.errors import ConfigError, RewardError, TdmError, closest

# name in a spec -> (module of this package, function); imported only when asked for, since OCR
# brings an inference engine with it.
_BUILTIN = {
    "shapes": ("shapes", "dense"),
    "shapes:strict": ("shapes", "strict"),
    "shapes:clean": ("shapes", "clean"),
    "ocr": ("ocr", "contains"),
    "ocr:exact": ("ocr", "exact"),
    "jpeg": ("image", "jpeg"),
}
# name -> (module, function that builds the reward from the options in parentheses)
_BUILT = {
    "geneval": ("geneval", "dense"),
    "geneval:strict": ("geneval", "strict"),
    "remote": ("remote", "remote"),
}
# The plus of "1e+2*ocr" belongs to a number, one between parentheses to an option.
_PLUS = re.compile(r"(?<!\d[eE])\+(?![^(]*\))")
_CALL = re.compile(r"(?P<name>[\w:]+)\s*\((?P<options>.*)\)")
_TERM = re.compile(r"(?:(?P<weight>[^*]*)\*)?(?P<name>[^*]+)")


class Reward(Protocol):
    """Scores B pictures against their B prompts.

    `images` are RGB PIL pictures; the result is a sequence, array or tensor of B finite numbers,
    larger is better. A reward with a keyword `metadata` also gets the B prompts' metadata. One with
    a method `to(device)` is moved out of the GPU while others work, if the recipe says so.
    """

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any: ...


@dataclass(frozen=True)
class Term:
    """One weighted reward of a sum."""

    weight: float
    name: str
    fn: Callable[..., Any]


@dataclass(frozen=True)
class WeightedSum:
    """`sum_i weight_i * reward_i`; a single reward is the sum of one term of weight 1."""

    name: str
    terms: tuple[Term, ...]

    def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[Any] | None = None,
    ) -> np.ndarray:
        """Return float64 `[B]`. Raises RewardError naming the term that misbehaved."""
        total_B = np.zeros(len(images))
        for term in self.terms:
            total_B += term.weight * _score(term.name, term.fn, images, prompts, metadata)
        return total_B

    def to(self, device: Any) -> WeightedSum:
        """Move the models of those rewards that have a `to(device)`, and return self."""
        for term in self.terms:
            if callable(move := getattr(term.fn, "to", None)):
                move(device)
        return self


def load_reward(spec: str) -> WeightedSum:
    """Build the reward that a spec names, e.g. `"0.5*ocr+0.5*shapes"` or `"my.py:score"`.

    A file may hold any number of callables; it is run once per call to this function.
    Raises ConfigError for an unknown name, a weight that is no finite number, a file that is
    missing or fails to import, and an attribute that is missing or not callable.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise ConfigError(f"reward: expected a spec such as '0.5*ocr+0.5*shapes', got {spec!r}.")
    return WeightedSum(spec, tuple(_term(text.strip(), spec) for text in _PLUS.split(spec)))


def score(
    reward: Callable[..., Any],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    metadata: Sequence[Any] | None = None,
) -> np.ndarray:
    """Call a reward and check its answer: float64 `[B]`, finite.

    Raises RewardError, naming the reward, if it raises (the cause is chained), returns anything
    but B numbers, or returns NaN or infinity (names the prompt). Raises ConfigError if there are
    not as many prompts (or metadata) as images. An empty batch is never passed on.
    """
    name = getattr(reward, "name", None) or getattr(reward, "__qualname__", type(reward).__name__)
    return _score(str(name), reward, images, prompts, metadata)


def _score(
    name: str,
    fn: Callable[..., Any],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    metadata: Sequence[Any] | None,
) -> np.ndarray:
    for field, given in (("prompts", prompts), ("metadata", metadata)):
        if given is not None and len(given) != len(images):
            raise ConfigError(f"{field}: got {len(given)} for {len(images)} images.")
    if not len(images):
        return np.zeros(0)
    extra = {"metadata": metadata} if metadata is not None and _takes_metadata(fn) else {}
    try:
        result = fn(images, prompts, **extra)
        if hasattr(result, "detach"):  # a tensor: may carry gradients or live on a device
            result = result.detach().cpu()
        values = np.asarray(result)
    except TdmError:
        raise  # already says what is wrong and whose mistake it is
    except (Exception, SystemExit) as error:  # a scorer's exit would be the run's, with status 0
        raise RewardError(f"reward '{name}' raised {type(error).__name__}: {error}") from error
    return _checked(name, values, prompts)


def _checked(name: str, values: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    if values.dtype.kind not in "biuf":
        raise RewardError(
            f"reward '{name}' must return one number per image, got elements of type "
            f"{values.dtype}."
        )
    if values.shape != (len(prompts),):
        raise RewardError(
            f"reward '{name}' must return {len(prompts)} numbers, one per image, got an answer of "
            f"shape {list(values.shape)}."
        )
    reward_B = values.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(reward_B))
    if bad.size:
        raise RewardError(
            f"reward '{name}' returned {reward_B[bad[0]]} for image {bad[0]}, prompt "
            f"{prompts[bad[0]]!r} ({bad.size} of {len(prompts)} are not finite)."
        )
    return reward_B


def _takes_metadata(fn: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a callable written in C may have no signature
        return False
    return any(p.name == "metadata" or p.kind is p.VAR_KEYWORD for p in parameters)


def _term(text: str, spec: str) -> Term:
    match = _TERM.fullmatch(text)
    if not match:
        raise ConfigError(f"reward: cannot read the term {text!r} of {spec!r}: want [weight*]name.")
    name, weight = match["name"].strip(), 1.0
    if match["weight"] is not None:
        try:
            weight = float(match["weight"])
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ConfigError(f"reward: weight '{match['weight']}' in {spec!r} is not a number.")
    return Term(weight, name, _find(name))


def _find(name: str) -> Callable[..., Any]:
    call = _CALL.fullmatch(name)
    if call:
        return _built(call["name"], call["options"])
    if name in _BUILT:
        return _built(name, "")
    if name not in _BUILTIN:
        return _from_file(name)
    module, function = _BUILTIN[name]
    return getattr(importlib.import_module(f"tdm_r1.rewards.{module}"), function)


def _built(name: str, text: str) -> Callable[..., Any]:
    """Build the reward `name(text)`, text being its options."""
    if name not in _BUILT:
        known = f"'{name}' takes none" if name in _BUILTIN else f"unknown name '{name}'"
        raise ConfigError(
            f"reward: {known}; rewards with options: {', '.join(_BUILT)}.{closest(name, _BUILT)}"
        )
    module, function = _BUILT[name]
    build = getattr(importlib.import_module(f"tdm_r1.rewards.{module}"), function)
    allowed = inspect.signature(build).parameters
    options = {}
    for item in filter(None, map(str.strip, text.split(","))):
        key, equals, value = map(str.strip, item.partition("="))
        if not equals or key not in allowed or key in options:
            raise ConfigError(
                f"reward: {name} cannot take the option {item!r}; allowed once each: "
                f"{', '.join(f'{option}=...' for option in allowed)}.{closest(key, allowed)}"
            )
        options[key] = value
    return build(**options)


def _from_file(name: str) -> Callable[..., Any]:
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        known = [*_BUILTIN, *_BUILT]
        raise ConfigError(
            f"reward: unknown name '{name}'.{closest(name, known)} "
            f"Allowed: {', '.join(known)}, or path/to/file.py:callable."
        )
    module = _run_file(Path(path).expanduser())
    fn = getattr(module, attribute, None)
    if not callable(fn):
        found = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ConfigError(
            f"reward: {path} has no callable named '{attribute}'.{closest(attribute, found)} "
            f"It has: {', '.join(found) or 'none'}."
        )
    return fn


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"reward: there is no file {path} (looked in {Path.cwd()}).")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    module_spec = importlib.util.spec_from_file_location(
        f"tdm_r1_reward_{path.stem}_{digest}", path
    )
    assert module_spec is not None and module_spec.loader is not None, path
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look a module up by its name
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_spec.name]
        raise ConfigError(f"reward: {path} raised {type(error).__name__}: {error}") from error
    return module
