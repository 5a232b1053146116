"""Command line: `python -m tdm_r1 generate "two red circles" -o out.png`.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tdm_r1.errors import ConfigError, report

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status instead of raising."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or printed the help
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return arguments.run(arguments)
    except Exception as error:  # the boundary of the program
        return report(error, "tdm-r1", details=arguments.traceback, unnamed=ConfigError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tdm-r1", description="Few-step text-to-image models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_convert_lora(commands)
    _add_demo(commands)
    return parser


def _add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="draw images for one or more prompts")
    add = parser.add_argument
    add(
        "prompts", nargs="+", metavar="PROMPT", help="one image per prompt, or --num-images of them"
    )
    add(
        "--model",
        default="tiny-sd3",
        help="shipped name, directory or Hub id (default: %(default)s)",
    )
    add("--lora", metavar="FILE", help="LoRA to merge; any layout that convert-lora reads")
    add("--seed", type=int, help="whole number; drawn and printed when absent")
    add("--height", type=int, help="pixels")
    add("--width", type=int, help="pixels")
    add("--steps", type=int, default=4, help="default: %(default)s")
    add("--solver", default="auto", help="auto, euler or dpm2m (default: %(default)s)")
    add("--guidance-scale", type=float, metavar="G", help="as in diffusers; off when absent")
    add("--num-images", type=int, default=1, metavar="N", help="per prompt (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--dtype", default="auto", help="auto, bfloat16 or float32 (default: %(default)s)")
    add("--backend", default="auto", help="kernel backend (default: %(default)s)")
    add("-o", "--output", type=Path, default=Path("out.png"), metavar="FILE",
        help="several images become FILE-0, FILE-1, ... (default: %(default)s)")  # fmt: skip
    add("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(run=_generate)


def _add_convert_lora(commands) -> None:
    parser = commands.add_parser(
        "convert-lora",
        help="write a LoRA in the layout of diffusers, PEFT or ComfyUI",
        description="Reads those three layouts and the published TDM and TDM-R1 checkpoints.",
    )
    add = parser.add_argument
    add("input", metavar="IN", help=".safetensors file, its directory, or a published .ckpt")
    add("output", metavar="OUT", help=".safetensors file, or a directory (PEFT: always)")
    add("--layout", required=True, help="diffusers, peft or comfyui")
    add("--model", metavar="NAME_OR_DIR",
        help="model to check the LoRA against; a .ckpt of no published size needs it")  # fmt: skip
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: as in IN")
    add("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(run=_convert_lora)


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo", help="watch a tiny generator learn from a black-box reward"
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change the recipe tiny-sd3-shapes, e.g. --set iterations=60",
    )  # fmt: skip
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(run=_demo)


def _convert_lora(arguments: argparse.Namespace) -> int:
    import torch

    from tdm_r1.models.loading import empty_transformer
    from tdm_r1.models.lora import check_lora
    from tdm_r1.models.lora_files import write_lora
    from tdm_r1.models.lora_list import load_lora
    from tdm_r1.pipeline import find_model

    model = None
    if arguments.model is not None:
        model, _ = empty_transformer(find_model(arguments.model)[0])
    tensors = load_lora(arguments.input, model)
    if model is not None:
        check_lora(model, tensors)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    print(write_lora(arguments.output, tensors, arguments.layout, dtype=dtype))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from tdm_r1 import demo

    summary = demo.run(arguments.overrides)
    print(f"{summary['reward']} on {summary['num_prompts']} held-out pictures:")
    for when in ("before", "after"):
        low, high = summary[f"reward_{when}_interval95"]
        print(f"{when:6} {summary[f'reward_{when}']:.3f} [{low:.3f}, {high:.3f}]")
    print(f"{summary['seconds']:.0f} s; pictures and numbers in {summary['output']}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output
    if output.suffix.lower() not in SUFFIXES:  # before minutes of work, not after
        raise ConfigError(f"--output is {str(output)!r}; allowed endings: {', '.join(SUFFIXES)}")
    if not output.parent.is_dir():
        raise ConfigError(f"--output is {str(output)!r}, but {output.parent} is not a directory")
    if output.is_dir():
        raise ConfigError(f"--output is {str(output)!r}, a directory; allowed: a file")
    from tdm_r1.engine import (
        Engine,
    )  # torch and the model libraries take seconds; --help should not

    engine = Engine.from_pretrained(
        arguments.model,
        lora=arguments.lora,
        device=arguments.device,
        dtype=arguments.dtype,
        steps=arguments.steps,
        solver=arguments.solver,
        backend=arguments.backend,
    )
    images = engine.generate(
        arguments.prompts,
        seed=arguments.seed,
        height=arguments.height,
        width=arguments.width,
        num_images_per_prompt=arguments.num_images,
        guidance_scale=arguments.guidance_scale,
    )
    print(f"seed {engine.last_seed}", file=sys.stderr)
    for index, image in enumerate(images):
        path = output
        if len(images) > 1:
            path = output.with_name(f"{output.stem}-{index}{output.suffix}")
        image.save(path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
