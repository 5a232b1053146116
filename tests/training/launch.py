"""Several ranks, as a user starts them, or at once."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tdm_r1.training.distributed import GROUP

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "tdm_r1" / "train.py"
LIMIT = 400  # seconds


def clean_environment():
    """Without the process group that trainers of this process have joined."""
    kept = {name: value for name, value in os.environ.items() if name not in GROUP}
    return {**kept, "OMP_NUM_THREADS": "1"}


def launch(arguments, ranks=1):
    """`deepspeed --num_gpus N tdm_r1/train.py ...`."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--master_port", str(29500 + os.getpid() % 1000), str(TRAIN), *arguments]
    environment = clean_environment()
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=LIMIT, cwd=ROOT
    )


def start_ranks(arguments, ranks=2, script=TRAIN):
    """The processes that `deepspeed` ends in; its own two take seconds to import what they do.

    All that they say is in `stderr`; as soon as one fails, the others are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = clean_environment() | group
    command = [sys.executable, str(script), *arguments]
    with tempfile.TemporaryFile("w+") as said:
        running = []
        for rank in map(str, range(ranks)):
            mine = environment | {"RANK": rank, "LOCAL_RANK": rank}
            running.append(subprocess.Popen(command, env=mine, cwd=ROOT, stdout=said, stderr=said))
        deadline = time.monotonic() + LIMIT
        try:
            while {None} <= (codes := {run.poll() for run in running}) <= {None, 0}:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the ranks run for more than {LIMIT} s")
                time.sleep(0.05)
        finally:
            for run in running:
                run.kill()
                run.wait()
        said.seek(0)
        status = next(iter(codes - {None, 0}), 0)
        return subprocess.CompletedProcess(command, status, "", said.read())


def assert_same_roles(run, names, ranks=2):
    """Every rank of a finished run has logged the same hash of each role of `names`."""
    found = {}
    for name, digest in re.findall(r"role hash (\w+) ([0-9a-f]{64})", run.stdout + run.stderr):
        found.setdefault(name, []).append(digest)
    assert set(found) == set(names)
    for name, digests in found.items():
        assert len(digests) == ranks and len(set(digests)) == 1, (name, digests)
