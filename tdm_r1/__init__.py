"""Few-step diffusion transformers: fast generation, and RL fine-tuning with the TDM-R1 method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdm_r1.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy: the engine pulls in transformers and diffusers, which `tdm_r1.flow` has no use for.
    if name == "Engine":
        from tdm_r1.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
