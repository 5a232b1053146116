"""The ops of the diffusion transformers, and the registry that picks an implementation of each."""

from tdm_kernels.registry import Impl, Ops, Target, explain, select

__all__ = ["Impl", "Ops", "Target", "explain", "select"]
