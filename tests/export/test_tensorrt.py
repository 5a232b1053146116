"""Engines of TensorRT-RTX, built without a GPU: what is in them, and every way not to get one."""

from __future__ import annotations

import re
import shutil
import sys
import threading

import numpy as np
import pytest
import torch

from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, ExportError, LoadError
from tdm_r1.export import build, tensorrt
from tdm_r1.export.cli import main
from tdm_r1.export.tensorrt import Target, build_engine, build_engines
from tdm_r1.exported.manifest import read_manifest
from tdm_r1.files import sha256
from tdm_r1.pipeline import load_pipeline

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

PRODUCTS = ("gemm", "runtime_fusion")  # as the library calls its kernels for them
FULL = {"FLOAT", "INT64", "INT32", "BOOL"}  # fp32, and what counts and compares


def refused(capsys, *arguments) -> str:
    status = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err.strip()
    assert status == 2 and "\n" not in error
    return error


def test_missing_package(capsys, tmp_path, sd3_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    error = refused(capsys, "--model", sd3_dir, "--output", tmp_path / "out", "--trt")
    assert error.endswith("pip install tensorrt-rtx") and not list(tmp_path.iterdir())


@pytest.fixture
def trt():
    return pytest.importorskip("tensorrt_rtx")


@pytest.mark.slow
class TestExports:
    @pytest.fixture
    def manifest(self, trt, sd3_export):
        return read_manifest(sd3_export)

    def test_the_manifest_lists_every_engine(self, trt, manifest, sd3_export):
        engines = manifest.engines
        assert engines["runtime"] == "tensorrt-rtx" and engines["version"] == trt.__version__
        assert engines["precision"] == "fp32"
        assert engines["compute_capabilities"] == ["8.9", "12.0"]
        assert engines["parts"].keys() == manifest.graphs.keys()
        for part in engines["parts"].values():
            assert manifest.files[part["file"]] == sha256(sd3_export / part["file"])

    def test_an_engine_is_as_large_as_its_weights(self, manifest, sd3_export):
        for name, part in manifest.engines["parts"].items():
            model = onnx.load(sd3_export / manifest.graphs[name]["file"])
            floats = [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.FLOAT]
            weights = sum(onnx.numpy_helper.to_array(w).nbytes for w in floats)
            assert weights < (sd3_export / part["file"]).stat().st_size

    def test_every_layer_is_in_fp32(self, manifest):
        for part in manifest.engines["parts"].values():
            assert part["layers"].keys() <= FULL and part["layers"]["FLOAT"] > 100

    def test_profiles_are_the_ranges(self, manifest):
        profile = manifest.graphs["transformer"]["profile"]
        assert profile["x_BChw"] == [[1, 16, 4, 4], [1, 16, 8, 8], [3, 16, 12, 12]]
        low, high = manifest.axes["text"]
        clip, width = manifest.text["clip_length"], manifest.transformer["joint_attention_dim"]
        context = manifest.graphs["context"]["profile"]["tokens_BTE"]
        assert context == [
            [images, clip + text, width] for images, text in ((1, low), (1, high), (3, high))
        ]

    def test_an_engine_that_was_changed(self, trt, sd3_export, tmp_path):
        copy = shutil.copytree(sd3_export, tmp_path / "copy")
        (copy / "context.engine").write_bytes(b"half")
        with pytest.raises(LoadError, match="context.engine is not the file that was exported"):
            Engine.from_pretrained(copy)

    def test_zimage(self, trt, zimage_export, tmp_path):
        root = shutil.copytree(zimage_export, tmp_path / "copy")
        manifest = read_manifest(root)
        assert manifest.engines is None
        shapes = manifest.graphs["transformer"]["profile"]
        assert [shape[1] for shape in shapes["rope_image_1I1H"]] == [32, 32, 64]
        assert [shape[1] for shape in shapes["text_BPD"]] == [32, 64, 96]
        heard = []
        engines = build_engines(root, manifest.graphs, Target(), heard.append)
        assert engines["parts"].keys() == manifest.graphs.keys()
        assert all(part["layers"].keys() <= FULL for part in engines["parts"].values())
        assert [line for line in heard if line.startswith("transformer.engine: ")]


def write_small(path, op: str):
    """x [batch, 4, 4] -> relu -> `op`, as an ONNX file."""
    helper, dtype = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], name="node_first"),
        helper.make_node(op, ["h"], ["y"], name="node_second"),
    ]
    given = [helper.make_tensor_value_info("x", dtype, ["batch", 4, 4])]
    made = [helper.make_tensor_value_info("y", dtype, None)]
    graph = helper.make_graph(nodes, "small", given, made)
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


@pytest.mark.usefixtures("trt")
class TestBuilding:
    profile = {"x": [[1, 4, 4], [2, 4, 4], [3, 4, 4]]}

    def build(self, root, op="Exp", target=None, profile=None, say=print) -> dict:
        graph = write_small(root / "part.onnx", op)
        engine = root / "part.engine"
        return build_engine(graph, engine, profile or self.profile, target or Target(), say)

    def test_what_the_library_is_asked_for(self, trt, tmp_path, monkeypatch):
        configs, create = [], trt.Builder.create_builder_config
        monkeypatch.setattr(
            trt.Builder,
            "create_builder_config",
            lambda self: configs.append(create(self)) or configs[-1],
        )
        found = self.build(tmp_path)
        assert found["kinds"] == {"ACTIVATION": {"FLOAT": 1}, "UNARY": {"FLOAT": 1}}
        assert found["fused"] == {"kgen": {"Float": 1}}  # both in one kernel
        assert (tmp_path / "part.engine").stat().st_size > 1000
        (config,) = configs
        found = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
        assert found == [trt.ComputeCapability.SM89, trt.ComputeCapability.SM120]
        assert config.num_optimization_profiles == 1
        assert not config.get_flag(trt.BuilderFlag.TF32)
        assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    def test_engines_differ_by_what_they_are_for(self, tmp_path):
        written = set()
        for capabilities in (("8.9",), ("12.0",), ("8.9", "12.0")):
            self.build(tmp_path, target=Target(capabilities))
            written.add(sha256(tmp_path / "part.engine"))
        assert len(written) == 3

    def test_an_op_that_the_parser_refuses(self, tmp_path):
        message = r"part: TensorRT-RTX cannot take Det \(node 'node_second'\): UNSUPPORTED_NODE"
        with pytest.raises(ExportError, match=message):
            self.build(tmp_path, op="Det")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU cannot do")
    def test_no_refittable_engine_without_a_gpu(self, trt, tmp_path, monkeypatch):
        # The day this fails, LoRAs can be swapped in engines that are built ahead of time.
        create = trt.Builder.create_builder_config

        def refittable(builder):
            config = create(builder)
            config.set_flag(trt.BuilderFlag.REFIT)
            return config

        monkeypatch.setattr(trt.Builder, "create_builder_config", refittable)
        graph = write_small(tmp_path / "part.onnx", "Exp")
        model = onnx.load(graph)
        weight = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
        model.graph.initializer.append(weight)
        model.graph.node[1].CopyFrom(onnx.helper.make_node("MatMul", ["h", "weight"], ["y"]))
        onnx.save(model, graph)
        build = graph, tmp_path / "part.engine", self.profile
        # It runs out of a GPU at one of several places, each with words of its own.
        with pytest.raises(ExportError, match="part: TensorRT-RTX cannot build the engine: .+"):
            build_engine(*build, Target(("8.9",)), print)
        monkeypatch.undo()
        assert build_engine(*build, Target(("8.9",)), print)["kinds"]["MATRIX_MULTIPLY"] == {
            "FLOAT": 1
        }

    def test_an_fp32_island_shows_in_the_engine(self, tmp_path):
        helper, kinds = onnx.helper, onnx.TensorProto
        draw = np.random.default_rng(0)
        weights = [draw.standard_normal((4, 4)).astype(np.float32) for _ in range(3)]
        nodes, held, x = [], [], "x"
        for i, kind in enumerate((kinds.BFLOAT16, kinds.FLOAT, kinds.BFLOAT16)):
            held.append(helper.make_tensor(f"w{i}", kind, (4, 4), weights[i].flatten()))
            nodes.append(helper.make_node("Cast", [x], [f"c{i}"], to=kind))
            nodes.append(helper.make_node("MatMul", [f"c{i}", f"w{i}"], [f"p{i}"]))
            nodes.append(helper.make_node("Softmax", [f"p{i}"], [x := f"s{i}"]))
        given = helper.make_tensor_value_info("x", kinds.FLOAT, ["batch", 4, 4])
        made = helper.make_tensor_value_info(x, kinds.BFLOAT16, None)
        graph = helper.make_graph(nodes, "island", [given], [made], held)
        opset = helper.make_opsetid("", 20)
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "i")
        found = build_engine(tmp_path / "i", tmp_path / "e", self.profile, Target(), print)
        products = {
            dtypes: count
            for kind, counts in found["fused"].items()
            if kind in PRODUCTS
            for dtypes, count in counts.items()
        }
        assert products == {"BFloat16": 2, "Float": 1}

    def test_a_file_that_is_no_graph(self, tmp_path):
        with pytest.raises(ExportError, match="absent: TensorRT-RTX cannot take the graph: "):
            build_engine(tmp_path / "absent.onnx", tmp_path / "e", self.profile, Target(), print)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ([[1, 4, 4], [2, 4, 4], [3, 4, 5]], "profile 0"),
            ([[3, 4, 4], [2, 4, 4], [1, 4, 4]], "MIN<=OPT<=MAX"),
        ],
    )
    def test_a_build_that_fails(self, tmp_path, shapes, message):
        with pytest.raises(ExportError, match=f"part: .*cannot build the engine: .*{message}"):
            self.build(tmp_path, profile={"x": shapes})
        assert not (tmp_path / "part.engine").exists()

    def test_progress_and_an_interrupt(self, tmp_path, monkeypatch):
        lines, outcomes, run = [], [], tensorrt._build

        def watched(*arguments):
            try:
                outcomes.append(run(*arguments))
            except ExportError as error:
                outcomes.append(str(error))
                raise

        def interrupt(line):
            lines.append(line)
            raise KeyboardInterrupt

        monkeypatch.setattr(tensorrt, "_build", watched)
        monkeypatch.setattr(tensorrt, "REPORT_EVERY", 0.0)
        threads = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            self.build(tmp_path, say=interrupt)
        assert re.fullmatch(r"part\.engine: .+, 0 s so far", lines[0])
        assert "canceled" in outcomes[0] and threading.active_count() == threads
        assert not (tmp_path / "part.engine").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ("--trt", "--compute-capability", "8.9", "9.0"),
                r"--compute-capability is '9.0'; TensorRT-RTX .* builds for .*8\.9, 12\.0",
            ),
            (("--trt", "--compute-capability", "8.9", "8.9"), "is 8.9 8.9; allowed: each once"),
            (("--trt", "--runtime", "trt"), "'trt'; allowed: 'tensorrt-rtx', 'tensorrt'"),
            (
                ("--runtime", "tensorrt-rtx"),
                "--runtime, --compute-capability and --plugins go with",
            ),
        ],
    )
    def test_options(self, capsys, tmp_path, sd3_dir, options, message):
        error = refused(capsys, "--model", sd3_dir, "--output", tmp_path / "out", *options)
        assert re.search(message, error), error
        assert not list(tmp_path.iterdir())

    def test_no_capability_at_all(self):
        with pytest.raises(ConfigError, match="--compute-capability is empty; allowed: 7.5"):
            Target(()).check()

    @pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
    def test_a_build_that_stops_leaves_nothing(self, tmp_path, sd3_dir, monkeypatch, stop):
        def write_half(graph, engine, *arguments):
            engine.write_bytes(b"half")
            raise stop

        entry = {"file": "part.onnx", "profile": self.profile}
        monkeypatch.setattr(build, "_write_graphs", lambda *arguments: {"part": entry})
        monkeypatch.setattr(build, "open_parts", lambda *arguments: load_pipeline(sd3_dir))
        monkeypatch.setattr(build, "check", lambda *arguments: {"worst": {"part": {"error": 0.0}}})
        monkeypatch.setattr(tensorrt, "build_engine", write_half)
        with pytest.raises(type(stop)):
            build.export_model(sd3_dir, tmp_path / "out", target=Target())
        assert not list(tmp_path.iterdir())
