"""Gradient checkpointing: a block keeps its inputs alone and runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tdm_r1.models.lora import LoRALinear


def block_runner(enabled: bool) -> Callable[..., Any]:
    """`run(block, *inputs)`: a plain call, or one that is recomputed where gradients are wanted."""
    return recomputed if enabled and torch.is_grad_enabled() else _call


def recomputed(block: nn.Module, *inputs: Any) -> Any:
    """block(*inputs) with the same values and gradients, its activations computed twice.

    The second time the block runs under the autocast of the first and with the adapters that were
    active then: several roles share one base, and another's turn may have come in between.
    """
    adapters = [m for m in block.modules() if isinstance(m, LoRALinear)]
    names = [adapter.active for adapter in adapters]

    def run(*inputs: Any) -> Any:
        with _selected(adapters, names):
            return block(*inputs)

    # No dropout anywhere, so no generator needs to be restored.
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def _selected(adapters: Sequence[LoRALinear], names: Sequence[str | None]) -> Iterator[None]:
    before = [adapter.active for adapter in adapters]
    for adapter, name in zip(adapters, names, strict=True):
        adapter.select(name)
    try:
        yield
    finally:
        for adapter, name in zip(adapters, before, strict=True):
            adapter.select(name)


def _call(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)
