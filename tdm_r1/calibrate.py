"""Which layers may run in 8 bits: each one's error alone, and the rule that chooses.

    python -m tdm_r1.calibrate tiny-zimage [--precision int8] [--limit 0.05] [-o report.json]

fp8 is e4m3, emulated where the device has none, beside bfloat16; int8 stands beside the device's
own dtype: bfloat16 on CUDA, float32 on a CPU.
Every layer is put into 8 bits alone and the same noise followed to the end. `own` is the error of
what the layer adds to the stream, at the first step, where its inputs are the unquantised model's;
`latents` is the error of the final latents; both relative, by norms over a few prompts. Errors of
different layers add like independent ones, as the root of the sum of their squares. The rule: keep
whole the layers with the largest `latents`, as few as bring that root to `limit` or below. The
report then measures what it chose.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tdm_kernels.registry import ROWS, explain
from torch import Tensor

from tdm_r1 import flow
from tdm_r1.errors import ConfigError, LoadError, closest, report
from tdm_r1.models.layers import Transformer
from tdm_r1.models.loading import read_json
from tdm_r1.pipeline import Pipeline, load_pipeline
from tdm_r1.trajectory import Sampler

LIMIT = 0.05  # of the final latents' norm
PRECISIONS = ("auto", *ROWS)
PROMPTS = (
    "a red circle and a blue square",
    "a photograph of an old fisherman mending nets at dawn",
    "the word OPEN on a green sign",
    "four yellow triangles",
)


@dataclass(frozen=True)
class LayerError:
    """Relative errors of one layer in 8 bits, all others whole."""

    name: str
    own: float
    latents: float


@dataclass(frozen=True)
class Calibration:
    """Layers by their error, the largest first; which stay whole, and what that gives."""

    layers: tuple[LayerError, ...]
    limit: float
    kept: tuple[str, ...]
    predicted: float
    measured: float
    precision: str = "fp8"

    @property
    def quantized(self) -> tuple[str, ...]:
        """The layers to run in 8 bits."""
        return tuple(row.name for row in self.layers if row.name not in self.kept)


def calibrate(
    pipeline: Pipeline,
    schedule: flow.Schedule,
    *,
    precision: str = "fp8",
    limit: float = LIMIT,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
    quantize: Callable[[Sequence[str]], None] | None = None,
    candidates: Sequence[str] | None = None,
) -> Calibration:
    """Measure every layer of a transformer in `precision` and leave it as chosen.

    `quantize(names)` puts these layers, and no others, into 8 bits: by default those of a frozen
    transformer by `Transformer.quantize`. `candidates`, by default all, are chosen from; the others
    are measured and kept whole. Raises ConfigError for a limit that is not above 0 and what
    `Transformer.quantize` refuses.
    """
    if not limit > 0:
        raise ConfigError(f"limit is {limit}; allowed: a relative error above 0")
    model = pipeline.transformer
    quantize = quantize or (lambda names: model.quantize(names, precision))
    names = list(model.layers_by_name())
    runs = Runs(pipeline, schedule, prompts, seed)
    quantize(())
    exact, streams = runs.follow(names)
    rows = []
    for name in names:
        quantize([name])
        found, mine = runs.follow([name])
        (before, after), (_, changed) = streams[name], mine[name]
        own = _relative(changed, after, size=after - before)
        rows.append(LayerError(name, own, _relative(found, exact)))
    rows.sort(key=lambda row: -row.latents)
    free = [row for row in rows if candidates is None or row.name in candidates]
    barred = tuple(row.name for row in rows if row not in free)
    kept = barred + choose(free, limit)
    left = [row for row in rows if row.name not in kept]
    quantize([name for name in names if name not in kept])
    measured = _relative(runs.follow([])[0], exact)
    return Calibration(tuple(rows), limit, kept, _together(left), measured, precision)


def choose(rows: Sequence[LayerError], limit: float) -> tuple[str, ...]:
    """Return the fewest layers to keep so that the errors of the rest amount to at most `limit`."""
    rows = sorted(rows, key=lambda row: -row.latents)
    number = next(n for n in range(len(rows) + 1) if _together(rows[n:]) <= limit)
    return tuple(row.name for row in rows[:number])


def read_calibration(path: str | Path) -> Calibration:
    """Read a report written by this program. Raises LoadError for any other file."""
    values = read_json(Path(path))
    try:
        layers = tuple(LayerError(**row) for row in values.pop("layers"))
        return Calibration(layers, kept=tuple(values.pop("kept")), **values)
    except (KeyError, TypeError) as error:
        raise LoadError(f"{path} is no calibration report: {error}") from error


def calibration_of(model: Transformer, precision: str, path: str | Path) -> Calibration:
    """Read the report on `model` in `precision`.

    Raises LoadError as `read_calibration` does, ConfigError for a report on other layers or another
    precision.
    """
    found = read_calibration(path)
    if found.precision != precision:
        raise ConfigError(f"{path} reports on {found.precision}, not on {precision}")
    if {row.name for row in found.layers} != set(model.layers_by_name()):
        raise ConfigError(f"{path} reports on the layers of another model")
    return found


def dtype_beside(
    precision: str, dtype: Any, calibration: str | Path | None, *, exported: bool = False
) -> Any:
    """Return the dtype to load for `precision`: fp8 multiplies into bfloat16 alone.

    Raises ConfigError for other words than `PRECISIONS`, settings that disagree, and any for an
    export, whose graphs have theirs.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision is {precision!r}; allowed: {', '.join(map(repr, PRECISIONS))}."
            + closest(precision, PRECISIONS)
        )
    if precision == "auto" and calibration is not None:
        raise ConfigError("a calibration is for precision='fp8' or 'int8' only")
    if precision != "auto" and exported:
        raise ConfigError(
            f"precision is {precision!r}; allowed for an export: 'auto', for"
            " `tdm-r1-export --precision` has chosen it"
        )
    if precision != "fp8":
        return dtype
    if dtype not in ("auto", "bfloat16", torch.bfloat16):
        raise ConfigError(f"dtype is {dtype!r}; allowed with precision='fp8': 'auto', 'bfloat16'")
    return "bfloat16"


def apply_precision(
    pipeline: Pipeline, schedule: flow.Schedule, precision: str, calibration: str | Path | None
) -> None:
    """Quantise the layers that a report allows, or that are measured now; release their weights.

    Raises ConfigError for fp8 where there is none (only backend="reference" emulates it), or a
    report on other layers or another precision.
    """
    model = pipeline.transformer
    if precision == "fp8" and model.backend != "reference":
        target = model.device, model.dtype, model.head_dim, False
        reason = explain(*target)["pack_linear_fp8"]["triton"]
        if reason != "ok":
            raise ConfigError(
                f"precision is 'fp8', which cannot run on {model.device.type}: triton {reason};"
                " allowed: 'int8', or 'fp8' with backend='reference', which emulates it"
            )
    if calibration is None:
        calibrate(pipeline, schedule, precision=precision)
    else:
        model.quantize(calibration_of(model, precision, calibration).quantized, precision)
    model.release()


class Runs:
    """The same trajectories, again and again: noise of a seed, prompts, the schedule's steps."""

    def __init__(
        self, pipeline: Pipeline, schedule: flow.Schedule, prompts: Sequence[str], seed: int
    ) -> None:
        self.model, self.schedule = pipeline.transformer, schedule
        side = pipeline.default_size // pipeline.vae.scale_factor
        shape = (len(prompts), pipeline.vae.latent_channels, side, side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.noise_BChw = noise.to(pipeline.device)
        self.cond = pipeline.text.encode(list(prompts))
        self.t_K1 = torch.tensor(schedule.timesteps, device=pipeline.device)[:, None]

    @torch.no_grad()
    def follow(self, watched: Sequence[str]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Return the final latents, and the stream before and after layers at the first step."""
        context = self.model.context(self.cond, *self.noise_BChw.shape[2:])
        inputs = self.noise_BChw, context, self.model.modulation(context, self.t_K1)
        with _streams(self.model, watched) as streams:
            *_, x_BChw = Sampler(self.model, self.schedule).states(*inputs)
        return x_BChw, streams


@contextmanager
def _streams(
    model: Transformer, names: Sequence[str]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, inputs: tuple, out: tuple) -> None:
            rows = out[0].shape[1]
            found.setdefault(name, (inputs[0][:, :rows].float(), out[0].float()))

        return hook

    hooks = [model.layers_by_name()[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _relative(found: Tensor, exact: Tensor, size: Tensor | None = None) -> float:
    return float((found - exact).norm() / (exact if size is None else size).norm())


def _together(rows: Sequence[LayerError]) -> float:
    return sum(row.latents**2 for row in rows) ** 0.5


def main(argv: list[str] | None = None) -> int:
    """Print a row per layer, the worst first, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="shipped name, directory or Hub id")
    parser.add_argument("--lora", metavar="FILE", help="LoRA to merge first")
    parser.add_argument("--precision", choices=ROWS, default="fp8", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit", type=float, default=LIMIT, help="default: %(default)s")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, help="write the report here, as JSON")
    args = parser.parse_args(argv)
    try:
        if args.output is not None and not args.output.parent.is_dir():  # before the minutes
            raise ConfigError(f"--output is {str(args.output)!r}; its directory is not there")
        dtype = dtype_beside(args.precision, "auto", None)
        pipeline = load_pipeline(args.model, lora=args.lora, device=args.device, dtype=dtype)
        schedule = flow.schedule(pipeline.default_solver, args.steps, pipeline.shift)
        found = calibrate(pipeline, schedule, precision=args.precision, limit=args.limit)
        if args.output is not None:
            args.output.write_text(json.dumps(asdict(found), indent=1) + "\n")
    except (ConfigError, OSError) as error:
        return report(error, "tdm_r1.calibrate", details=False)
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    print(f"{'layer':24} {'own':>9} {'latents':>9}")
    for row in found.layers:
        kept = f"  {dtype}" if row.name in found.kept else ""
        print(f"{row.name:24} {row.own:9.2e} {row.latents:9.2e}{kept}")
    print(
        f"{len(found.kept)} of {len(found.layers)} layers stay in {dtype}, the others run in"
        f" {found.precision}: the final latents err by {found.measured:.2e},"
        f" predicted {found.predicted:.2e}, limit {found.limit:g}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
