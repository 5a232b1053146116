"""Joining a process group, where an earlier process was killed as it compiled."""

import subprocess
import sys

import deepspeed

from tdm_r1.training import distributed
from tests.training.launch import ROOT, clean_environment

OP = "deepspeed_shm_comm"


def test_a_process_alone_compiles_nothing_and_waits_for_no_lock(tmp_path):
    (tmp_path / OP).mkdir()
    (tmp_path / OP / "lock").touch()
    environment = clean_environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    code = "from tdm_r1.training import distributed as d; d.init(); print(d.world_size())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "1", done.stderr
    assert [path.name for path in (tmp_path / OP).iterdir()] == ["lock"]


def test_ranks_that_wait_for_a_lock_say_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, OP, True)
    distributed._spare_the_compiler(deepspeed)
    assert not caplog.records
    (tmp_path / OP / "lock").touch()
    distributed._spare_the_compiler(deepspeed)
    assert str(tmp_path / OP / "lock") in caplog.text
    assert deepspeed.ops.__compatible_ops__[OP]
