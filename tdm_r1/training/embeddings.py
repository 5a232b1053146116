"""Prompts encoded once, on disk: after that a run needs no text encoder.

A run's prompts are known before it starts: draw n is a function of (seed, n). SD3.5 takes 1.7 MB a
prompt and a run may need ten thousand, so they lie in the output folder, which every rank must see,
and are read as they are needed (the operating system keeps what fits in memory):

    embeddings/<key>/<rank>-<number>.safetensors     up to 256 prompts each
    embeddings/<key>/<rank>.json                     which prompt is where

<key> is a hash of what the encoding depends on, so another model or T5 length starts anew, and an
interrupted or resumed run goes on with what is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tdm_r1.config import Recipe
from tdm_r1.errors import ConfigError
from tdm_r1.files import save_tensors
from tdm_r1.pipeline import Pipeline
from tdm_r1.prompts import PromptSampler
from tdm_r1.text import TextEncoder
from tdm_r1.training import distributed

log = logging.getLogger(__name__)
FOLDER = "embeddings"
_SHARD = 256
_ON_DEVICE = 64  # prompts; SD3.5: 110 MB


class StoredText(TextEncoder):
    """A text encoder that reads what `precompute` wrote, the prompts used last kept on the device.

    Raises ConfigError for any other prompt.
    """

    def __init__(self, folder: Path, family: str, device: torch.device) -> None:
        super().__init__(device=device, cache_size=_ON_DEVICE)
        self.folder, self.family = folder, family
        self.where = read_index(folder)
        self._files: dict[str, Any] = {}

    def _encode(self, prompts: list[str]) -> list[tuple[Tensor, Tensor | None]]:
        return [self._read(prompt) for prompt in prompts]

    def _read(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        if prompt not in self.where:
            raise ConfigError(
                f"the text encoders are gone (memory.precompute_text) and {prompt!r} was not "
                "among the run's prompts"
            )
        name, row = self.where[prompt]
        if name not in self._files:
            self._files[name] = safe_open(self.folder / name, framework="pt")
        file = self._files[name]
        pooled = f"{row}.pooled"
        rows = file.get_tensor(f"{row}.tokens"), None
        if pooled in file.keys():  # noqa: SIM118, a safetensors file is no mapping
            rows = rows[0], file.get_tensor(pooled).to(self.device)
        return rows[0].to(self.device), rows[1]


def needed_prompts(recipe: Recipe, sampler: PromptSampler | None, evaluated: Iterable[str]):
    """Every prompt of a run in the order of its first use: the empty one, evaluation's, training's.

    `sampler` is the run's own, or None for a method that draws no prompts; it is not moved.
    """
    drawn: list[tuple[int, str]] = []
    if sampler is not None:
        fresh = PromptSampler(sampler.pools, sampler.seed)
        drawn = fresh.draw(recipe.iterations * recipe.rollout.num_prompts)
    return list(dict.fromkeys(["", *evaluated, *(prompt for _, prompt in drawn)]))


def precompute(pipeline: Pipeline, prompts: list[str], output: Path) -> None:
    """Encode `prompts` into `output`, a share per rank, and put the store in the encoders' place.

    Every prompt is encoded alone, so its embedding does not depend on what else is in the run.
    """
    folder = output / FOLDER / _key(pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    known = read_index(folder)
    distributed.barrier()  # before any rank adds to what another is reading
    missing = [prompt for prompt in prompts if prompt not in known]
    mine = missing[distributed.rank() :: distributed.world_size()]
    if missing:
        log.info("encoding %d prompts into %s", len(missing), folder)
    for start in range(0, len(mine), _SHARD):
        _write(folder, pipeline.text, mine[start : start + _SHARD])
    distributed.barrier()
    pipeline.text = StoredText(folder, pipeline.family, pipeline.device)
    if pipeline.device.type == "cuda":
        torch.cuda.empty_cache()


def read_index(folder: Path) -> dict[str, tuple[str, int]]:
    """prompt -> (file, row) of everything that was stored in `folder`."""
    found: dict[str, tuple[str, int]] = {}
    for file in sorted(folder.glob("*.json")):
        for name, prompts in json.loads(file.read_text()).items():
            found |= {prompt: (name, row) for row, prompt in enumerate(prompts)}
    return found


def _write(folder: Path, text: TextEncoder, prompts: list[str]) -> None:
    """One more shard of this rank; the index names it only once it is whole."""
    tensors: dict[str, Tensor] = {}
    for row, prompt in enumerate(prompts):
        cond = text.encode([prompt])
        tensors[f"{row}.tokens"] = cond.tokens_BTE[0].cpu()
        if cond.pooled_BE is not None:
            tensors[f"{row}.pooled"] = cond.pooled_BE[0].cpu()
    index = folder / f"{distributed.rank():04d}.json"
    shards = json.loads(index.read_text()) if index.is_file() else {}
    name = f"{distributed.rank():04d}-{len(shards):05d}.safetensors"
    save_tensors({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    partial = index.with_suffix(".partial")
    partial.write_text(json.dumps({**shards, name: prompts}))
    partial.replace(index)


def _key(pipeline: Pipeline) -> str:
    """A hash of what an embedding depends on."""
    facts = {
        "model": str(pipeline.path.resolve()),
        "t5_length": getattr(pipeline.text, "t5_length", None),
        "dtype": str(pipeline.text.encode([""]).tokens_BTE.dtype),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
