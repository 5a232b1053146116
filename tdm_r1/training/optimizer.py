"""Optimizers of a role: AdamW, or Muon for the matrices of the blocks with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdm_r1.config import Optimizer
from tdm_r1.errors import LoadError

_MATRICES = (".attn", ".ff", ".attention.", ".feed_forward.")  # in SD3's and in Z-Image's blocks


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimizer: one state, one list of groups.

    Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest orthogonal matrix; with
    `match_rms_adamw` (Liu et al., arXiv 2502.16982) its updates have AdamW's size, so that both
    parts share one learning rate.
    """

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], config: Optimizer
    ) -> None:
        decay = config.weight_decay
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            )
        ]
        if others:  # adapters are matrices and nothing else
            self.parts.append(_adamw(others, config))
        super().__init__([*matrices, *others], {"lr": config.lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update both parts from the gradients; `closure` is called once, first."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


def build(parameters: Mapping[str, nn.Parameter], config: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that `config.name` asks for, over named parameters.

    "muon" takes the matrices of attention and feed-forward layers; embeddings, modulation, norms,
    biases and the output layer stay with AdamW.
    """
    if config.name == "adamw":
        return _adamw(list(parameters.values()), config)
    matrices = {
        name: p
        for name, p in parameters.items()
        if p.ndim == 2 and any(part in name for part in _MATRICES)
    }
    others = [p for name, p in parameters.items() if name not in matrices]
    return MuonAdamW(list(matrices.values()), others, config)


def _adamw(parameters: list[nn.Parameter], config: Optimizer) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def state_tensors(optimizer) -> tuple[dict[str, Tensor], list[int]]:
    """Moments as "<index>.<slot>", and the step count of every parameter (0: none kept)."""
    tensors, steps = {}, []
    for index, parameter in enumerate(_parameters(optimizer)):
        state = optimizer.state.get(parameter, {})
        steps.append(int(state.get("step", 0)))
        for key, value in state.items():
            if key != "step":
                tensors[f"{index:05d}.{key}"] = value
    return tensors, steps


def load_state(optimizer, tensors: Mapping[str, Tensor], steps: list[int]) -> None:
    """Inverse of `state_tensors`.

    Raises LoadError if the parameters are not as many, or a moment has not its parameter's shape.
    """
    parameters = _parameters(optimizer)
    if len(parameters) != len(steps):
        raise LoadError(
            f"the checkpoint's optimizer has {len(steps)} tensors, this one {len(parameters)}"
        )
    for name, tensor in tensors.items():
        index, slot = name.split(".", 1)
        parameter = parameters[int(index)]
        if tensor.shape != parameter.shape:
            shape, wanted = list(tensor.shape), list(parameter.shape)
            raise LoadError(f"the checkpoint's optimizer slot {name} is {shape}, not {wanted}")
        optimizer.state[parameter][slot] = tensor.to(parameter.device)
    for parameter, step in zip(parameters, steps, strict=True):
        if step:
            optimizer.state[parameter]["step"] = torch.tensor(float(step))


def _parameters(optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
