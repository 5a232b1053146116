"""How fast is an export next to the Engine on the same weights, and to torch.compile?

    python -m bench.export --export DIR [--backend onnx | tensorrt-rtx | tensorrt] [--compile]
                           [--batches 1 4] [--threads 2]

DIR was made by `tdm-r1-export`: its graphs run on ONNX Runtime, on a CPU, or its engines on a GPU,
next to the Engine in the same precision, there on CUDA graphs. `--compile`, the default on a GPU,
adds an Engine whose transformer is plain PyTorch ops compiled by Inductor, in CUDA graphs as ours
is. All draw the same pictures from the same latents (checked first) for one prompt, `batch` images
of it. `new prompt` clears the prompt caches before every call. The stage rows time the parts on
their own.
"""

from __future__ import annotations

import argparse
import sys
from argparse import BooleanOptionalAction
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tdm_kernels import native

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/export.py`, too

from bench.timing import Times, environment, interleaved, store
from bench.timing import report as print_result
from tdm_r1.engine import Engine
from tdm_r1.errors import TdmError, report
from tdm_r1.export.parity import TOLERANCE
from tdm_r1.exported.loading import BACKENDS
from tdm_r1.exported.manifest import Manifest, read_manifest
from tdm_r1.exported.tensorrt import RUNTIMES
from tdm_r1.trajectory import Trajectory, to_output

PROMPT = "two red circles"
OURS, COMPILED = "engine", "torch.compile"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
ROUNDED = 0.05  # of the largest value after one step: whole loops of half precision drift apart


def engines(root: Path, manifest: Manifest, backend: str, compiled: bool) -> dict[str, Engine]:
    """The export, the Engine on its device and, if asked for, the compiled one, by name."""
    schedule = manifest.schedule
    settings: dict[str, Any] = {"steps": schedule.num_steps, "solver": schedule.solver}
    export = Engine.from_pretrained(root, backend=backend, **settings)
    settings |= {"device": export.device, "dtype": "float32", "lora": manifest.lora}
    own: dict[str, Any] = {}
    if export.device.type == "cuda":
        settings["dtype"] = DTYPES[manifest.precision]
        own = {"precision": "fp8"} if manifest.precision == "fp8" else {}
    found = {"onnxruntime" if backend == "onnx" else backend: export}
    found[OURS] = Engine.from_pretrained(manifest.model, **settings, **own)
    if compiled:
        plain = Engine.from_pretrained(manifest.model, backend="reference", **settings)
        plain.pipeline.transformer.compile(dynamic=False)
        found[COMPILED] = plain
    return found


def check(each: dict[str, Engine], latents: torch.Tensor, exact: bool) -> dict[str, float]:
    """Max |theirs - engine| / max |engine|, of the final latents or, if not `exact`, of x_1.

    Raises RuntimeError where they differ: a comparison of different pictures would mean nothing.
    """
    k, most = (-1, TOLERANCE) if exact else (1, ROUNDED)
    x = {name: _rollout(engine, latents).x[k] for name, engine in each.items()}
    ours = x.pop(OURS)
    errors = {
        name: ((theirs - ours).abs().max() / ours.abs().max()).item() for name, theirs in x.items()
    }
    for name, error in errors.items():
        if not error <= most:
            raise RuntimeError(f"{name} differs from the Engine: latents by {error}")
    return errors


def compare(each: dict[str, Engine], batch: int, repeats: int, exact: bool) -> dict:
    """Time whole calls and stages at one batch size; returns a row of the result."""
    export, *others = each
    engine = each[OURS]
    size = engine.pipeline.default_size
    latents = engine.noise(list(range(batch)), size, size)
    row: dict = {"batch": batch, "latent_error": check(each, latents, exact)}
    final = engine.generate(
        PROMPT, latents=latents, num_images_per_prompt=batch, output_type="latent"
    )
    kinds: dict[str, Callable[[Engine], object]] = {
        "new prompt": lambda each: _new_prompt(each, latents),
        "known prompt": lambda each: _draw(each, latents),
        "text": _encode,
        "DiT": lambda each: _rollout(each, latents),
        "VAE": lambda each: to_output(each.decode(final), "pil"),
    }
    row["ms"] = {
        kind: interleaved(
            {name: lambda engine=engine, call=call: call(engine) for name, engine in each.items()},
            repeats=repeats,
        )
        for kind, call in kinds.items()
    }
    row["speedup over"] = {
        kind: {name: round(times[name].p50 / times[export].p50, 2) for name in others}
        for kind, times in row["ms"].items()
    }
    return row


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--export", type=Path, required=True, help="made by tdm-r1-export")
    parser.add_argument("--backend", choices=BACKENDS, default="onnx")
    parser.add_argument("--compile", action=BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="store the JSON here too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    compiled = arguments.backend != "onnx" if arguments.compile is None else arguments.compile
    try:
        manifest = read_manifest(arguments.export)
        each = engines(arguments.export, manifest, arguments.backend, compiled)
    except TdmError as error:
        return report(error, "bench.export", details=False)
    rows: list[dict] = []
    facts: dict[str, Any] = {"model": manifest.model, "precision": manifest.precision}
    facts |= {"steps": manifest.schedule.num_steps, "solver": manifest.schedule.solver}
    facts["dtype"] = str(each[OURS].pipeline.transformer.dtype).removeprefix("torch.")
    facts["kernels"] = "reference" if native.load() else f"native {native.instruction_set()}"
    runtime = manifest.engines if arguments.backend in RUNTIMES else None
    facts |= {next(iter(each)): runtime["version"] if runtime else version("onnxruntime")}
    result = {"bench": "export", **facts, **environment(), "rows": rows}
    for batch in arguments.batches:
        rows.append(row := compare(each, batch, arguments.repeats, manifest.precision == "fp32"))
        for kind, times in row["ms"].items():
            for name, found in times.items():
                print(f"batch {batch:3d}  {kind:13s} {name:13s} {_line(found)}", flush=True)
        store(result, arguments.output)
    print_result(result, arguments.output)
    return 0


def _rollout(engine: Engine, latents: torch.Tensor) -> Trajectory:
    return engine.rollout(engine.pipeline.text.encode([PROMPT]), latents)


def _draw(engine: Engine, latents: torch.Tensor) -> object:
    return engine.generate(PROMPT, latents=latents, num_images_per_prompt=len(latents))


def _new_prompt(engine: Engine, latents: torch.Tensor) -> object:
    engine.clear_cache()
    return _draw(engine, latents)


def _encode(engine: Engine) -> object:
    engine.clear_cache()
    return engine.pipeline.text.encode([PROMPT])


def _line(times: Times) -> str:
    return f"{times.p20:9.2f} {times.p50:9.2f} {times.p80:9.2f} ms"


if __name__ == "__main__":
    sys.exit(main())
