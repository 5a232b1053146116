"""`python -m tdm_kernels`: print which implementation of each op can run on this machine."""

from __future__ import annotations

import argparse
import sys

import torch

from tdm_kernels.registry import BACKENDS, explain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    """Print one row per op and one column per backend; return 0."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m tdm_kernels", description=__doc__)
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--no-grad", action="store_true", help="inference only")
    args = parser.parse_args(argv)
    table = explain(args.device, DTYPES[args.dtype], args.head_dim, grad=not args.no_grad)
    for op, reasons in table.items():
        cells = "  ".join(f"{name}: {reasons.get(name, 'not implemented')}" for name in BACKENDS)
        print(f"{op:24s}{cells}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
