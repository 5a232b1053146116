"""Fixtures shared by all tests: random tiny models on disk, built once per run."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Before torch is imported: small tensors gain nothing from threads, and a busy machine loses a lot.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

from tests import tiny  # noqa: E402


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Give the tests of a file to one worker, and all of exports: they share what is costly."""
    from xdist.scheduler import LoadFileScheduling

    class ByWhatIsShared(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/export" if file.startswith("tests/export/") else file

    return ByWhatIsShared(config, log)


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_the_way() -> None:
    """Let the search for garbage pass over what is imported: it took a sixth of all the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def sd3_dir(tmp_path_factory) -> Path:
    """Random SD3 directory, flow-matching Euler scheduler."""
    return tiny.make_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="session")
def sd3_dpm_dir(tmp_path_factory) -> Path:
    """The same weights with DPM-Solver++ stored as the scheduler."""
    return tiny.make_sd3(tmp_path_factory.mktemp("models") / "sd3-dpm", solver="dpm2m")


@pytest.fixture(scope="session")
def sd3_no_t5_dir(tmp_path_factory) -> Path:
    """An SD3 directory without its third text encoder."""
    return tiny.make_sd3(tmp_path_factory.mktemp("models") / "sd3-no-t5", with_t5=False)


@pytest.fixture(scope="session")
def zimage_dir(tmp_path_factory) -> Path:
    """Random Z-Image directory."""
    return tiny.make_zimage(tmp_path_factory.mktemp("models") / "zimage")


@pytest.fixture
def bright(tmp_path) -> str:
    """The name of a reward for bright pictures."""
    from tests.training.common import bright_reward

    return bright_reward(tmp_path)
