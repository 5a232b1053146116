"""How fast does ONNX Runtime run an export next to the Engine on the same weights, on a CPU?

    python -m bench.export --export DIR [--batches 1 4] [--threads 2]

DIR was made by `tdm-r1-export`. Both draw the same pictures from the same latents (checked first)
for one prompt, `batch` images of it. `new prompt` clears the prompt caches before every call. The
stage rows time the parts on their own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tdm_kernels import native

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/export.py`, too

from bench.timing import Times, environment, interleaved, report
from tdm_r1.engine import Engine
from tdm_r1.export.parity import TOLERANCE
from tdm_r1.exported.manifest import read_manifest
from tdm_r1.trajectory import to_output

PROMPT = "two red circles"


def check(engine: Engine, exported: Engine, latents: torch.Tensor) -> float:
    """Max |exported - engine| / max |engine| of final latents. Raises RuntimeError if they differ.

    A comparison of different pictures would mean nothing.
    """
    ours, theirs = (
        each.generate(PROMPT, latents=latents, num_images_per_prompt=len(latents),
                      output_type="latent")
        for each in (exported, engine)
    )  # fmt: skip
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"the export differs from the Engine: latents by {error}")
    return error


def compare(engine: Engine, exported: Engine, batch: int, repeats: int) -> dict:
    """Time whole calls and stages at one batch size; returns a row of the result."""
    size = engine.pipeline.default_size
    latents = engine.noise(list(range(batch)), size, size)
    row: dict = {"batch": batch, "latent_error": check(engine, exported, latents)}
    final = engine.generate(
        PROMPT, latents=latents, num_images_per_prompt=batch, output_type="latent"
    )
    both = {"engine": engine, "onnxruntime": exported}
    kinds: dict[str, Callable[[Engine], object]] = {
        "new prompt": lambda each: _new_prompt(each, latents),
        "known prompt": lambda each: _draw(each, latents),
        "text": _encode,
        "DiT": lambda each: each.rollout(each.pipeline.text.encode([PROMPT]), latents),
        "VAE": lambda each: to_output(each.decode(final), "pil"),
    }
    row["ms"] = {
        kind: interleaved(
            {name: lambda each=each, call=call: call(each) for name, each in both.items()},
            repeats=repeats,
        )
        for kind, call in kinds.items()
    }
    row["speedup"] = {
        kind: round(times["engine"].p50 / times["onnxruntime"].p50, 2)
        for kind, times in row["ms"].items()
    }
    return row


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--export", type=Path, required=True, help="made by tdm-r1-export")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="store the JSON here too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    manifest = read_manifest(arguments.export)
    settings: dict[str, Any] = {
        "steps": manifest.schedule.num_steps,
        "solver": manifest.schedule.solver,
    }
    exported = Engine.from_pretrained(arguments.export, backend="onnx", **settings)
    engine = Engine.from_pretrained(manifest.model, device="cpu", dtype="float32", **settings)
    rows = []
    for batch in arguments.batches:
        rows.append(row := compare(engine, exported, batch, arguments.repeats))
        for kind, times in row["ms"].items():
            for name, found in times.items():
                print(f"batch {batch:3d}  {kind:13s} {name:12s} {_line(found)}")
    facts = {"model": manifest.model, **settings, "dtype": "float32"}
    facts["kernels"] = "reference" if native.load() else f"native {native.instruction_set()}"
    facts["onnxruntime"] = version("onnxruntime")
    report({"bench": "export", **facts, **environment(), "rows": rows}, arguments.output)
    return 0


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
