"""What goes wrong around an export: bad input, hands that edit, ops that ONNX lacks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, ExportError, LoadError
from tdm_r1.export import build
from tdm_r1.export.cli import _parser, main
from tdm_r1.export.graphs import Axis, Graph
from tdm_r1.export.onnx_graph import write_graph
from tdm_r1.export.parity import sizes_to_try
from tdm_r1.exported.loading import load_exported
from tdm_r1.exported.manifest import NAME
from tdm_r1.models.lora_files import WEIGHTS_NAME
from tdm_r1.pipeline import ASSETS

pytest.importorskip("onnxscript")


@pytest.fixture
def copy(sd3_export, tmp_path):
    """An export of one's own, to damage."""
    return shutil.copytree(sd3_export, tmp_path / "copy")


def refused(root, message):
    with pytest.raises(LoadError, match=message):
        Engine.from_pretrained(root, backend="onnx")


@pytest.mark.slow
class TestDamagedExports:
    def test_a_manifest_edited_by_hand(self, copy):
        values = json.loads((copy / NAME).read_text())
        values["axes"]["height"][1] = 1024
        (copy / NAME).write_text(json.dumps(values))
        refused(copy, "export.json was changed after the export")

    def test_a_manifest_laid_out_anew_is_the_same(self, copy):
        values = json.loads((copy / NAME).read_text())
        (copy / NAME).write_text(json.dumps(values, indent=7))
        assert Engine.from_pretrained(copy, backend="onnx").pipeline.path == copy

    def test_a_file_changed(self, copy):
        path = copy / "transformer.onnx"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        refused(copy, "transformer.onnx is not the file that was exported")

    def test_a_file_missing(self, copy):
        (copy / "context.onnx").unlink()
        refused(copy, "lacks context.onnx")

    def test_an_interrupted_export(self, copy):
        (copy / NAME).unlink()
        refused(copy, "is no export: it has no export.json")

    def test_a_file_that_was_added(self, copy):
        (copy / "README.md").write_text("mine")
        (copy / "tokenizer" / ".DS_Store").touch()
        load_exported(copy)
        (copy / "tokenizer" / "added_tokens.json").write_text('{"red": 3}')
        refused(copy, "added_tokens.json was added after the export")

    def test_another_format(self, copy):
        values = json.loads((copy / NAME).read_text())
        (copy / NAME).write_text(json.dumps({**values, "format": 99}))
        refused(copy, "has format 99")


class TestBadInput:
    def run(self, capsys, *arguments) -> tuple[int, str]:
        status = main([str(argument) for argument in arguments])
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        return status, error

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--heights", 40, 64), "--heights is 40 64; allowed: multiples of 16"),
            (("--widths", 64, 32), "--widths is 64 32; allowed: .* rising"),
            (("--heights", 64, 512), "--heights is 64 512; allowed: .* up to 256"),
            (("--batch", 0), "--batch is 0; allowed"),
            (("--text", 1, 8), "--text is 1 8; allowed: from 2"),
            (("--solver", "eler"), "Did you mean 'euler'"),
            (("--lora", "absent.safetensors"), "absent"),
        ],
    )
    def test_options(self, capsys, tmp_path, sd3_dir, options, message):
        output = tmp_path / "out"
        status, error = self.run(capsys, "--model", sd3_dir, "--output", output, *map(str, options))
        assert status == 2 and re.search(message, error), error
        assert not list(tmp_path.iterdir())

    def test_a_lora_of_another_model(self, capsys, tmp_path, sd3_dir):
        other = ASSETS / "tiny-zimage" / WEIGHTS_NAME
        command = "--model", sd3_dir, "--output", tmp_path / "out", "--lora", other
        status, error = self.run(capsys, *command)
        assert status == 2 and re.search("LoRA does not fit this model: .*attention.to_q", error)
        assert not list(tmp_path.iterdir())

    def test_a_full_disk(self, capsys, tmp_path, sd3_dir, monkeypatch):
        def write_half(graph, root, *arguments, **options):
            (root / f"{graph.name}.onnx").write_bytes(b"half")
            raise OSError(28, "No space left on device", str(root))

        monkeypatch.setattr(build, "write_graph", write_half)
        status, error = self.run(capsys, "--model", sd3_dir, "--output", tmp_path / "out")
        assert status == 1 and "OSError: [Errno 28] No space left on device" in error
        assert not list(tmp_path.iterdir())

    def test_an_output_that_exists(self, capsys, tmp_path, sd3_dir):
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        for output in (tmp_path, tmp_path / "link"):
            status, error = self.run(capsys, "--model", sd3_dir, "--output", output)
            assert status == 2 and "which exists" in error

    def test_an_output_that_cannot_be_made(self, capsys, tmp_path, sd3_dir):
        (tmp_path / "file").touch()
        output = tmp_path / "file" / "out"
        status, error = self.run(capsys, "--model", sd3_dir, "--output", output)
        assert status == 2 and "out', which cannot be made: " in error

    def test_a_signal(self, capsys, tmp_path, sd3_dir, monkeypatch):
        def stop(graph, root, *arguments, **options):
            (root / f"{graph.name}.onnx").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(build, "write_graph", stop)
        before = signal.getsignal(signal.SIGTERM)
        status, error = self.run(capsys, "--model", sd3_dir, "--output", tmp_path / "out")
        assert (status, error) == (130, "tdm-r1-export: interrupted; nothing was kept")
        assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) is before

    def test_engines_or_none(self, capsys, tmp_path, sd3_dir):
        with pytest.raises(SystemExit, match="2"):
            _parser().parse_args(["--model", str(sd3_dir), "--onnx-only", "--trt"])
        assert "not allowed with argument --onnx-only" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("package", "install"),
        [("onnxscript", "pip install onnx onnxscript"), ("onnxruntime", "pip install onnxruntime")],
    )
    def test_missing_packages(self, capsys, tmp_path, sd3_dir, monkeypatch, package, install):
        monkeypatch.setitem(sys.modules, package, None)
        status, error = self.run(capsys, "--model", sd3_dir, "--output", tmp_path / "out")
        assert status == 2 and error.endswith(install)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_export_that_stops_leaves_nothing(tmp_path, sd3_dir, monkeypatch, stop):
    def write_half(graph, root, *arguments, **options):
        (root / f"{graph.name}.onnx").write_bytes(b"half")
        raise stop

    monkeypatch.setattr(build, "write_graph", write_half)
    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        build.export_model(sd3_dir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_finished_work_is_kept_when_its_name_is_taken(tmp_path):
    output = tmp_path / "out"
    with (
        pytest.raises(
            ExportError, match="out has come into being .*; the finished export is in "
        ) as caught,
        build.written_whole(output) as root,
    ):
        (root / "graph").touch()
        (output / "other").mkdir(parents=True)
    assert (Path(str(caught.value).split(" is in ")[1]) / "graph").is_file()
    assert [path.name for path in output.iterdir()] == ["other"]


@pytest.mark.parametrize("family", ["sd3", "zimage"])
def test_default_axes_are_allowed_and_hold_the_default_size(family):
    pipeline = Engine.from_pretrained(f"tiny-{family}", device="cpu").pipeline
    axes = build.default_axes(pipeline)
    build.check_axes(pipeline, axes)
    for name in ("height", "width"):
        assert axes[name][0] < pipeline.default_size < axes[name][1]
    with pytest.raises(ConfigError, match="--text is"):
        build.check_axes(pipeline, {**axes, "text": (2, 10_000)})
    shorter = {**axes, "text": (8, axes["text"][1])}
    if family == "sd3":
        build.check_axes(pipeline, shorter)
    else:  # prompts of fewer tokens are as long once padded, and the gate draws them
        with pytest.raises(ConfigError, match="--text is 8 .*; allowed: 2, and at the end 64 to"):
            build.check_axes(pipeline, shorter)


def test_sizes_to_try_cover_every_axis_and_stay_on_the_grid():
    axes = {"batch": (1, 4), "height": (32, 96), "width": (512, 1040), "text": (2, 77)}
    tried = sizes_to_try(axes, 16)
    for name, (low, high) in axes.items():
        sizes = {sizes[name] for sizes in tried}
        assert {low, high} < sizes and len(sizes) == 3
    assert all(sizes[name] % 16 == 0 for sizes in tried for name in ("height", "width"))


@torch.library.custom_op("tdm_r1_tests::unknown", mutates_args=())
def unknown(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@unknown.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Inner(nn.Module):
    def forward(self, x):
        return unknown(x)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Identity(), Inner())

    def forward(self, x):
        return self.block(x) + 1


class Fixed(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] == 2 else x


class TestGraphsThatCannotBe:
    def graph(self, module) -> Graph:
        return Graph("part", module, {"x": (Axis.ranging("batch", 1, 4, 2), 3)}, ("y",))

    def test_an_op_that_onnx_lacks(self, tmp_path):
        message = (
            r"part: ONNX has no .*tdm_r1_tests\.unknown.* \(node 'unknown' in module 'block.1'\)"
        )
        with pytest.raises(ExportError, match=message):
            write_graph(self.graph(Unknown()), tmp_path)

    def test_a_size_baked_in(self, tmp_path):
        with pytest.raises(ExportError, match="part cannot be traced: .*batch"):
            write_graph(self.graph(Fixed()), tmp_path)
