"""The exports that these tests share: each costs its tracing once per run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tdm_r1.engine import Engine
from tdm_r1.export.cli import main

SIZES = ("--batch", "3", "--heights", "32", "96", "--widths", "32", "96")
ENGINES = () if find_spec("tensorrt_rtx") is None else ("--trt",)


@pytest.fixture(scope="session")
def sd3_export(tmp_path_factory) -> Path:
    """tiny-sd3, exported by the command line; with engines where they can be built."""
    output = tmp_path_factory.mktemp("exports") / "sd3"
    assert main(["--model", "tiny-sd3", "--output", str(output), *SIZES, *ENGINES]) == 0
    return output


@pytest.fixture(scope="session")
def zimage_export(tmp_path_factory) -> Path:
    """tiny-zimage, exported by the command line, to be refitted."""
    output = tmp_path_factory.mktemp("exports") / "zimage"
    command = ["--model", "tiny-zimage", "--output", str(output), *SIZES, "--text", "2", "96"]
    command.append("--refit")
    assert main(command) == 0
    return output


@pytest.fixture(scope="session")
def sd3_onnx(sd3_export) -> Engine:
    """The export on ONNX Runtime."""
    return Engine.from_pretrained(sd3_export, backend="onnx")


@pytest.fixture(scope="session")
def sd3_engine() -> Engine:
    """The model that was exported, on the fastest ops there are."""
    return Engine.from_pretrained("tiny-sd3", device="cpu")


@pytest.fixture(scope="session")
def zimage_pair(zimage_export) -> tuple[Engine, Engine]:
    """The export of Z-Image on ONNX Runtime, and the model that was exported."""
    exported = Engine.from_pretrained(zimage_export, backend="onnx")
    return exported, Engine.from_pretrained("tiny-zimage", device="cpu")
