"""Command line: `tdm-r1-export --model tiny-sd3 --output exported`.

The directory goes to stdout, progress and errors to stderr. Exit status: 0 done, 1 failed (a graph
that cannot be made, or that differs from the Engine, or of which no engine can be built), 2 wrong
use.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdm_r1.errors import ConfigError, report

if TYPE_CHECKING:
    from tdm_r1.export.tensorrt import Target

_LASTING = ("output", "lora", "calibration", "refit", "plugins")  # options that a dry run lacks


def main(argv: list[str] | None = None) -> int:
    """Export one model; returns the exit status instead of raising."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or printed the help
        return stop.code if isinstance(stop.code, int) else 2
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, tidies up
    try:
        return _export(arguments)
    except KeyboardInterrupt:
        print("tdm-r1-export: interrupted; nothing was kept", file=sys.stderr)
        return 130
    except Exception as error:  # the boundary of the program
        return report(error, "tdm-r1-export", details=arguments.traceback)
    finally:
        signal.signal(signal.SIGTERM, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tdm-r1-export",
        description="Write a model as ONNX graphs, checked against the Engine part by part,"
        " and as TensorRT engines made from them.",
    )
    add = parser.add_argument
    add("--model", required=True, help="shipped name, directory or Hub id")
    add("--output", type=Path, metavar="DIR", help="directory to make")
    dry = "trace a published model at full size, without weights, and stop; with --trt, build the"
    dry += " engines of its transformer, of random weights, and keep none"
    add("--dry-run", action="store_true", help=dry)
    add("--lora", metavar="FILE", help="LoRA to merge, in any layout that `generate` takes")
    add("--steps", type=int, default=4, help="of the schedule (default: %(default)s)")
    add("--solver", default="auto", help="auto, euler or dpm2m (default: %(default)s)")
    add("--batch", type=int, metavar="MOST", help="most images in one call (default: 4)")
    sizes: dict[str, Any] = {"nargs": 2, "type": int, "metavar": ("LOW", "HIGH")}
    add("--heights", **sizes, help="pixels (default: half to 1.5 times the model's own)")
    add("--widths", **sizes, help="pixels (default: as for --heights)")
    add("--text", **sizes, help="tokens: of SD3 those of T5, of Z-Image those of the prompt")
    precision = "of weights and products: fp32, bf16, fp16 or fp8 (default: %(default)s)"
    add("--precision", default="fp32", help=precision)
    report = "with --precision fp8: a report of tdm_r1.calibrate, of the layers that may be in fp8"
    add("--calibration", metavar="FILE", help=report)
    refit = "keep what Engine.refit needs to change the LoRA; engines then need a GPU to be built"
    add("--refit", action="store_true", help=refit)
    engines = parser.add_mutually_exclusive_group().add_argument
    engines("--onnx-only", action="store_true", help="stop at the ONNX graphs (the default)")
    engines("--trt", action="store_true", help="build TensorRT engines too")
    trt = parser.add_argument_group("with --trt").add_argument
    trt("--runtime", help="tensorrt-rtx, which needs no GPU (the default), or tensorrt")
    capability: dict[str, Any] = {"nargs": "+", "metavar": "X.Y"}
    capabilities = "of the GPUs (default: 8.9 12.0; of tensorrt that of the GPU here)"
    trt("--compute-capability", **capability, help=capabilities)
    plugins = "with --runtime tensorrt: put this package's Triton kernels into the engines"
    trt("--plugins", action="store_true", help=plugins)
    add("--traceback", action="store_true", help="show where an error came from")
    return parser


def _export(arguments: argparse.Namespace) -> int:
    # torch and the model libraries take seconds; --help should not
    from tdm_r1.export.build import export_model
    from tdm_r1.export.tensorrt import Target

    chosen = {
        "runtime": arguments.runtime,
        "compute_capabilities": arguments.compute_capability
        and tuple(arguments.compute_capability),
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if (chosen or arguments.plugins) and not arguments.trt:
        raise ConfigError("--runtime, --compute-capability and --plugins go with --trt")
    asked = {name: getattr(arguments, name) for name in ("refit", "plugins")}
    axes = {
        name: tuple(ends)
        for name, ends in (
            ("height", arguments.heights),
            ("width", arguments.widths),
            ("text", arguments.text),
        )
        if ends is not None
    }
    if arguments.batch is not None:
        axes["batch"] = (1, arguments.batch)
    target = Target(**chosen, **asked) if arguments.trt else None
    if arguments.dry_run:
        return _dry_run(arguments, axes, target)
    if arguments.output is None:
        raise ConfigError("--output is missing; allowed without it: --dry-run")
    export_model(
        arguments.model,
        arguments.output,
        axes=axes,
        lora=arguments.lora,
        steps=arguments.steps,
        solver=arguments.solver,
        precision=arguments.precision,
        calibration=arguments.calibration,
        refit=arguments.refit,
        target=target,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(arguments.output)
    return 0


def _dry_run(
    arguments: argparse.Namespace, axes: dict[str, tuple[int, int]], target: Target | None
) -> int:
    from tdm_r1.export.dry_run import dry_build, dry_run

    given = {name: getattr(arguments, name) for name in _LASTING}
    if unused := [f"--{name}" for name, value in given.items() if value]:
        raise ConfigError(f"{unused[0]} does not go with --dry-run, which keeps nothing")

    def say(line: str) -> None:
        print(line, flush=True)

    names = ("steps", "solver", "precision")
    sizes: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if target is not None:
        target.check(arguments.precision)  # before the minutes that tracing takes
    dry_run(arguments.model, axes=axes, say=say, **sizes)
    if target is not None:
        dry_build(arguments.model, target, axes=axes, say=say, **sizes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
