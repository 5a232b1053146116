"""Several ranks, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def clean_environment():
    """Without the process group that trainers of this process have joined."""
    joined = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in joined}
    return {**kept, "OMP_NUM_THREADS": "1"}


def launch(arguments, ranks=1, script=ROOT / "tdm_r1" / "train.py", **kwargs):
    """`deepspeed --num_gpus N tdm_r1/train.py ...`."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--master_port", str(29500 + os.getpid() % 1000), str(script), *arguments]
    env = clean_environment()
    return subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=400, cwd=ROOT, **kwargs
    )
