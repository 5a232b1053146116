"""Train: `deepspeed tdm_r1/train.py --recipe NAME [--set a.b=value ...] [--resume] [--traceback]`.

`--dry-run` prints what the run would take, and refuses what does not fit; it loads nothing.

Exit status 0 done, 1 failed, 2 the command or the recipe is wrong, 128 + N stopped by signal N.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

# `deepspeed tdm_r1/train.py` puts this folder, not the one above it, on the path.
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tdm_r1.config import load_recipe  # noqa: E402
from tdm_r1.errors import report  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Parse, build, loop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--recipe", required=True, help="shipped name or YAML file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        return _train(args)
    except Exception as error:  # the boundary of the program
        return report(error, "error", details=args.traceback)


def _train(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        from tdm_r1.training import plan

        made = plan.make_plan(recipe)
        if int(os.environ.get("RANK", "0")) == 0:
            print(plan.report(made))
        plan.require_fit(made)
        return 0
    from tdm_r1.training import distributed
    from tdm_r1.training.trainer import Interrupted, Trainer

    trainer = Trainer(recipe, resume=args.resume)
    try:
        trainer.run()
    except Interrupted as stop:
        print(f"interrupted: {stop}; --resume goes on from {recipe.output}", file=sys.stderr)
        return 128 + (trainer.stop_signal or 0)
    finally:
        distributed.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
