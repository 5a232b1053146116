"""Layers that multiply e4m3 by fixed scales: measured, chosen, and emulated in plain PyTorch.

The Engine gives every row a scale as it makes the row. A graph has one number for all that a linear
will ever read, so which layers stand that is measured anew, by the rule of `tdm_r1.calibrate`.

Scales are powers of two: what is dequantised is then exact in bfloat16, and a graph says the same
whether or not a runtime multiplies the scales into its products.

Shapes: D and F are a linear's input and output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tdm_kernels.quantized import MULTIPLES, SMALLEST_SCALE
from torch import Tensor, nn

from tdm_r1 import flow
from tdm_r1.calibrate import LIMIT, PROMPTS, Calibration, Runs, calibrate, calibration_of
from tdm_r1.errors import ConfigError, ExportError
from tdm_r1.models.layers import Transformer
from tdm_r1.models.packing import Packable
from tdm_r1.models.sd3_blocks import JointAttention
from tdm_r1.pipeline import Pipeline

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
HEADROOM = 2.0  # over the largest value measured: other prompts reach further
SEEDS = (1, 2, 3)  # of the noise whose trajectories are measured; errors are told of that of seed 0


@dataclass(frozen=True)
class Static:
    """Which layers run in e4m3, and how: `export.json` holds it under "fp8".

    found: the error of every layer under fixed scales, those kept in bf16, and what the final
    latents then err by against bf16. products: by path, of every linear of the layers in e4m3, the
    largest magnitude that it read ("amax") and the scale of what it reads. report: the file that
    said which layers may, or None.
    """

    found: Calibration
    products: dict[str, dict[str, float]]
    report: str | None = None

    @property
    def scales(self) -> dict[str, float]:
        """Path of a linear -> scale of what it reads."""
        return {path: product["scale"] for path, product in self.products.items()}

    @property
    def line(self) -> str:
        """What a user is told of it."""
        found = self.found
        return (
            f"fp8: {len(found.quantized)} of {len(found.layers)} layers, {len(self.products)}"
            f" products; the final latents err by {found.measured:.1e} against bf16 (limit"
            f" {found.limit:g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest holds."""
        layers = {"fp8": list(self.found.quantized), **asdict(self.found)}
        return {**layers, "report": self.report, "products": self.products}


def fixed_scale(amax: Tensor) -> Tensor:
    """Return 2^ceil(log2(amax / 448)), fp32 and at least 2^-126: what brings amax within e4m3."""
    mantissa, exponent = torch.frexp((amax.float() / E4M3_MAX).clamp(min=SMALLEST_SCALE))
    exponent = torch.where(mantissa > 0.5, exponent, exponent - 1)
    return torch.ldexp(torch.ones_like(mantissa), exponent)


def to_e4m3(x: Tensor, scale: Tensor | float) -> Tensor:
    """Return rne(min(max(x / scale, -448), 448)) as float8_e4m3fn: beyond its range it saturates.

    NaN stays NaN. Source: ONNX, QuantizeLinear with `saturate`.
    """
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def weight_scale(weight_FD: Tensor) -> Tensor:
    """Return a `fixed_scale` for every output feature, [F, 1]."""
    return fixed_scale(weight_FD.abs().amax(1, keepdim=True))


def round_trip(x: Tensor, scale: Tensor | float) -> Tensor:
    """Return `to_e4m3` times scale, in the dtype of x: exact in bfloat16 for powers of two."""
    return (to_e4m3(x, scale).float() * scale).to(x.dtype)


def calibrate_static(
    pipeline: Pipeline, schedule: flow.Schedule, calibration: str | Path | None = None
) -> Static:
    """Choose the layers of a frozen bf16 transformer that run in e4m3, and round their weights.

    `calibration` is a report of `tdm_r1.calibrate` on fp8: only layers that it allows may, within
    its limit; without one all may, within LIMIT. Every layer's error is measured. Raises
    ConfigError for a layer whose widths are no multiples of 16 and as `calibration_of` does,
    ExportError where no layer is left.
    """
    model = pipeline.transformer
    limit, candidates = LIMIT, None
    if calibration is not None:
        report = calibration_of(model, "fp8", calibration)
        limit, candidates = report.limit, report.quantized
    layers = linears_by_layer(model)
    largest = _watch(pipeline, schedule, layers)
    measured = {
        path: {"amax": amax, "scale": fixed_scale(torch.tensor(HEADROOM * amax)).item()}
        for path, amax in largest.items()
    }
    scales = {path: product["scale"] for path, product in measured.items()}
    model.unfreeze()
    with ExitStack() as stack:
        found = calibrate(
            pipeline,
            schedule,
            limit=limit,
            quantize=_switch(layers, scales, stack),
            candidates=candidates,
        )
    chosen = {path: part for name in found.quantized for path, part in layers[name].items()}
    if not chosen:
        least = min(found.layers, key=lambda row: row.latents)
        raise ExportError(
            f"no layer of {pipeline.name} is left for fp8 by the limit of {limit:g}: the least"
            f" error is that of {least.name}, {least.latents:.2g}; use --precision bf16"
        )
    for linear in chosen.values():
        linear.weight.data = round_trip(linear.weight.data, weight_scale(linear.weight.data))
    model.freeze()
    products = {path: measured[path] for path in chosen}
    return Static(found, products, None if calibration is None else str(calibration))


@contextmanager
def emulated(model: Transformer, scales: Mapping[str, float]) -> Iterator[None]:
    """Round what the linears of these paths read, for a while; weights are taken as they are.

    Without packing, so that every linear is called: the model is frozen before and after.
    """
    model.unfreeze()
    hooks = [_round_input(model.get_submodule(path), scale) for path, scale in scales.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.freeze()


def linears_by_layer(model: Transformer) -> dict[str, dict[str, nn.Linear]]:
    """Return, by layer, its linears by path: those that the Engine's 8 bits pack.

    Raises ConfigError for one whose sides are not what tensor cores ask of e4m3.
    """
    multiple = MULTIPLES[torch.float8_e4m3fn]
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, dict[str, nn.Linear]] = {}
    for name, layer in model.layers_by_name().items():
        parts = [module for module in layer.modules() if isinstance(module, Packable)]
        linears = [part for p in parts for group in p.groups for part in _read(p, group)]
        for linear in linears:
            if linear.weight.shape[0] % multiple or linear.weight.shape[1] % multiple:
                raise ConfigError(
                    f"{name} cannot run in fp8: {paths[id(linear)]} is"
                    f" {list(linear.weight.shape)}, and both must be multiples of {multiple}"
                )
        found[name] = {paths[id(linear)]: linear for linear in linears}
    return found


def _read(part: Packable, group: str) -> list[Any]:
    """Those linears of a group whose output is read: a graph has no others."""
    linears = part.siblings(group)
    if isinstance(part, JointAttention) and part.to_add_out is None:  # nobody asks for the text's
        return [linear for linear in linears if linear is not part.add_q_proj]
    return linears


def _watch(
    pipeline: Pipeline, schedule: flow.Schedule, layers: Mapping[str, Mapping[str, nn.Linear]]
) -> dict[str, float]:
    """Path of a linear -> the largest magnitude that it reads on the trajectories of SEEDS."""
    largest: dict[str, float] = {}

    def watch(path: str, linear: nn.Linear) -> Any:
        def hook(_module: Any, inputs: tuple) -> None:
            found = inputs[0].abs().max().item()
            largest[path] = max(largest.get(path, 0.0), found)

        return linear.register_forward_pre_hook(hook)

    model = pipeline.transformer.unfreeze()
    hooks = [watch(*item) for linears in layers.values() for item in linears.items()]
    try:
        for seed in SEEDS:
            Runs(pipeline, schedule, PROMPTS, seed).follow([])
    finally:
        for hook in hooks:
            hook.remove()
        model.freeze()
    return largest


def _switch(
    layers: Mapping[str, Mapping[str, nn.Linear]], scales: Mapping[str, float], stack: ExitStack
) -> Callable[[Sequence[str]], None]:
    """What puts these layers of an unpacked model, and no others, into e4m3; `stack` undoes it."""

    def quantize(names: Sequence[str]) -> None:
        stack.close()
        for path, linear in (item for name in names for item in layers[name].items()):
            whole = linear.weight.data
            stack.callback(setattr, linear.weight, "data", whole)
            linear.weight.data = round_trip(whole, weight_scale(whole))
            stack.callback(_round_input(linear, scales[path]).remove)

    return quantize


def _round_input(linear: nn.Module, scale: float) -> Any:
    return linear.register_forward_pre_hook(lambda _, inputs: (round_trip(inputs[0], scale),))
