"""Our kernels in engines of TensorRT: nodes and their bodies, and every way not to get them.

TensorRT is not here: a stand-in parses and builds, and evaluates what would be launched.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, ExportError
from tdm_r1.export import plugins, tensorrt
from tdm_r1.export.build import export_model
from tdm_r1.export.cli import main
from tdm_r1.export.emulation import write_wide
from tdm_r1.export.graphs import Axis, Graph
from tdm_r1.export.onnx_graph import LOW_OPSET, write_graph
from tdm_r1.export.parity import TOLERANCE
from tdm_r1.export.plugin_ops import bind
from tdm_r1.export.tensorrt import Target, build_engines
from tdm_r1.exported import tensorrt as runtimes
from tdm_r1.exported.manifest import DTYPES
from tdm_r1.exported.session import Session
from tdm_r1.exported.tensorrt import make_logger
from tests import tiny
from tests.export.build_stand_in import BuilderFlag, TensorRT

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from tdm_kernels import registry  # noqa: E402

D, N, H = 16, 2, 8


class Layers(nn.Module):
    """Every op, bound or not, as both models call them; fp32 in and out."""

    def __init__(self, ops, dtype) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.ops, self.dtype = ops, dtype
        sizes = {"w": (D,), "w_q": (H,), "w_k": (H,), "up": (D, D), "down": (D, D)}
        for name, size in sizes.items():
            weight = torch.randn(size, generator=draw).to(dtype)
            setattr(self, name, nn.Parameter(weight, requires_grad=False))

    def forward(self, x, modulation, rope):
        ops, (gate, scale, shift) = self.ops, modulation
        x = x.to(self.dtype)
        y = ops.norm_modulate(x, scale, weight_D=self.w, eps=1e-5)
        y = ops.swiglu(y @ self.up, ops.gelu_tanh(y @ self.down))
        q, k = (part.unflatten(-1, (N, H)) for part in (y @ self.up, y @ self.down))
        q, k = ops.qk_norm_rope(q, k, self.w_q, self.w_k, rope, eps=1e-5)
        h, y = ops.gate_residual_norm(x, (q + k).flatten(2), gate, scale, shift, eps=1e-6)
        both = ops.norm_modulate(y, torch.stack([scale, scale]), torch.stack([shift, shift]))
        return (h + both[0] + both[1]).float()


def graph_of(module) -> Graph:
    batch, tokens = Axis.ranging("batch", 1, 4, 2), Axis.ranging("tokens", 1, 40, 9, typical=32)
    inputs = {
        "x": (batch, tokens, D),
        "modulation": (3, batch, 1, D),
        "rope": (1, tokens, 1, H),
    }
    return Graph("part", module, inputs, ("y",))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Folder, entry in a manifest, and module of a graph in fp32."""
    root = tmp_path_factory.mktemp("fp32")
    return root, *write(root)


@pytest.fixture(scope="module")
def low(tmp_path_factory):
    """The same in bf16."""
    root = tmp_path_factory.mktemp("bf16")
    return root, *write(root, "bf16")


def write(root, precision="fp32"):
    """(the graph's entry in a manifest, the module that it was made of, unbound)."""
    dtype = DTYPES[precision]
    plain, seen = registry.select("reference"), {}
    opset = None if precision == "fp32" else LOW_OPSET
    entry = write_graph(graph_of(Layers(bind(plain, seen), dtype)), root, opset, seen=seen)
    assert seen.keys() == entry["plugins"].keys()
    return entry, Layers(plain, dtype)


def draw(b, t):
    draw = torch.Generator().manual_seed(b * t)
    shapes = (b, t, D), (3, b, 1, D), (1, t, 1, H)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def assert_the_gate_agrees(found, wanted) -> None:
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.fixture
def trt(monkeypatch):
    """A machine with a GPU of 8.9 and classic TensorRT, by its own account."""
    module = TensorRT()
    # Of these files alone: PyTorch itself has no GPU, and would look for it.
    cuda = SimpleNamespace(
        is_available=lambda: True,
        get_device_capability=lambda: (8, 9),
        get_device_name=lambda: "NVIDIA L4",
    )
    monkeypatch.setattr(tensorrt, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(plugins, "torch", SimpleNamespace(cuda=cuda))
    known = {"{}.{}".format(*cuda.get_device_capability()): None}
    monkeypatch.setattr(tensorrt, "known_capabilities", lambda runtime: known)
    monkeypatch.setattr(tensorrt, "import_tensorrt", lambda runtime: module)
    monkeypatch.setattr(tensorrt, "import_plugins", lambda: module.plugins)
    return module


class TestGraphs:
    def test_nodes_and_what_they_say(self, full):
        root, entry, _ = full
        nodes = {found["op"]: (name, found["nodes"]) for name, found in entry["plugins"].items()}
        assert nodes == {
            "norm_modulate": ("norm_modulate_16_fp32_x_scale_weight_per_sample_1em05", 1),
            "swiglu": ("swiglu_16_fp32_gate_up", 1),
            "gelu_tanh": ("gelu_tanh_16_fp32_x", 1),
            "qk_norm_rope": ("qk_norm_rope_2x8_fp32_q_k_weight_q_weight_k_rope_1em05", 1),
            "gate_residual_norm": (
                "gate_residual_norm_16_fp32_x_branch_gate_scale_shift_per_sample_1em06",
                1,
            ),
        }
        model = onnx.load(root / entry["file"])
        own = [node for node in model.graph.node if node.domain]
        assert {(node.domain, node.op_type) for node in own} == {
            (function.domain, function.name) for function in model.functions
        }
        # One body may be there for captions and for pictures, whose axes are not the same.
        bodies = [value for function in model.functions for value in function.value_info]
        sizes = [size for value in bodies for size in value.type.tensor_type.shape.dim]
        assert sizes and not any(size.dim_param for size in sizes)
        for node in own:
            found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert found == {"plugin_namespace": b"tdm_r1", "aot": 1}

    @pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 9), (4, 40)])
    def test_bodies_compute_the_ops(self, full, b, t):
        root, entry, module = full
        inputs = draw(b, t)
        (found,) = Session(root / entry["file"])(*inputs)
        assert_the_gate_agrees(found, module(*inputs))

    def test_bodies_are_watched_in_half_precision(self, low):
        root, entry, module = low
        watched = write_wide(root / entry["file"], root / "wide.onnx", "bf16")
        module, inputs = copy.deepcopy(module).float(), draw(2, 9)
        module.dtype = torch.float32
        (found,) = watched(*inputs)
        assert_the_gate_agrees(found, module(*inputs))
        # Inlined, every value that a plain graph would round is one of those watched.
        assert len(watched.places) > len(entry["plugins"])

    def test_nvidias_parser_takes_the_bodies_where_there_are_no_plugins(self, low):
        trt = pytest.importorskip("tensorrt_rtx")
        root, entry, _ = low
        logger = make_logger(trt)
        network = trt.Builder(logger).create_network(1)
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(root / entry["file"])), logger.errors
        kinds = {network.get_layer(i).type.name for i in range(network.num_layers)}
        assert {"MATRIX_MULTIPLY", "NORMALIZATION"} < kinds and "PLUGIN_V3" not in kinds

    def test_nvidias_parser_asks_for_the_plugins(self, low):
        trt = pytest.importorskip("tensorrt_rtx")
        root, entry, _ = low
        asked = []

        class Creator(trt.IPluginCreatorV3One):
            def __init__(self, name) -> None:
                super().__init__()
                self.name, self.plugin_namespace, self.plugin_version = name, "tdm_r1", "1"
                self.field_names = trt.PluginFieldCollection([])

            def create_plugin(self, node, fields, phase):
                asked.append((self.name, len(fields)))  # and makes none: that ends the parsing

        registry, creators = trt.get_plugin_registry(), [Creator(name) for name in entry["plugins"]]
        for creator in creators:
            assert registry.register_creator(creator, "tdm_r1")
        try:
            logger = make_logger(trt)
            network = trt.Builder(logger).create_network(1)
            parser = trt.OnnxParser(network, logger)
            assert not parser.parse_from_file(str(root / entry["file"]))
            assert "Could not create the plugin" in parser.get_error(0).desc()
            assert asked == [(parser.get_error(0).node_operator(), 0)]
            assert asked[0][0] in entry["plugins"]
        finally:
            for creator in creators:
                registry.deregister_creator(creator)


class TestEngines:
    target = Target(runtime="tensorrt", plugins=True)

    def test_every_node_is_a_plugin_at_every_shape(self, trt, full):
        pytest.importorskip("triton")
        root, entry, _ = full
        found = build_engines(root, {"part": entry}, self.target, print)
        assert (found["runtime"], found["version"]) == ("tensorrt", trt.__version__)
        assert (found["compute_capabilities"], found["device"]) == (["8.9"], "NVIDIA L4")
        kinds = found["parts"]["part"]["kinds"]
        assert kinds["PLUGIN_V3"] == {"FLOAT": 5} and "BODY" not in kinds
        launches = trt.launches["part"]
        assert len(launches) == 15 and {name for name, *_ in launches} == entry["plugins"].keys()
        assert {launch.grid[0] for *_, launch in launches} == {1, 4 * 32, 4 * 40}
        assert {shapes[0][:2] for _, shapes, _ in launches} == {(1, 1), (4, 32), (4, 40)}
        assert not trt.configs[0].flags

    def test_a_plugin_that_the_parser_passes_over(self, trt, full, monkeypatch):
        pytest.importorskip("triton")
        root, entry, _ = full
        monkeypatch.setattr(tensorrt, "register", lambda module, ops: None)
        with pytest.raises(ExportError, match="part: 0 of 5 nodes became plugins: gate_residual"):
            build_engines(root, {"part": entry}, self.target, print)

    def test_a_kernel_that_no_engine_could_launch(self, trt, full, monkeypatch):
        pytest.importorskip("triton")
        root, entry, _ = full
        monkeypatch.setattr("tdm_kernels.plugins.MOST_SHARED", -1)  # even a row of 16 is too much
        with pytest.raises(
            ExportError, match="part: .* needs 0 bytes of scratch .* allowed: 0 and -1"
        ):
            build_engines(root, {"part": entry}, self.target, print)

    def test_without_plugins_or_with_refit(self, trt, full, tmp_path):
        root, entry, _ = full
        target = replace(self.target, plugins=False, refit=True)
        found = tensorrt.build_engine(
            root / entry["file"], tmp_path / "e", entry["profile"], target, print
        )
        kinds = found["kinds"]
        assert "PLUGIN_V3" not in kinds and kinds["BODY"]
        assert trt.configs[0].flags == {BuilderFlag.REFIT}

    @pytest.mark.slow
    def test_a_model(self, trt, tmp_path):
        pytest.importorskip("triton")
        model = tiny.make_zimage(tmp_path / "zimage", layers=1)
        axes = {"batch": (1, 2), "height": (32, 64), "width": (48, 64), "text": (2, 64)}
        manifest = export_model(
            model, tmp_path / "out", axes=axes, precision="fp16", target=self.target
        )
        assert not manifest.graphs["vae_decoder"]["plugins"]
        for name in ("context", "transformer"):
            nodes = sum(op["nodes"] for op in manifest.graphs[name]["plugins"].values())
            assert all("_fp16_" in plugin for plugin in manifest.graphs[name]["plugins"])
            assert manifest.engines["parts"][name]["kinds"]["PLUGIN_V3"] == {"FLOAT": nodes}
            assert len(trt.launches[name]) == 3 * nodes > 0
        command = runtimes.rebuild_command(tmp_path / "out", manifest, "tensorrt")
        assert "--plugins" in command and "--compute-capability" not in command
        exported, engine = Engine.from_pretrained(tmp_path / "out"), Engine.from_pretrained(model)
        ours, theirs = (
            each.generate("two red circles", seed=1, height=48, width=64, output_type="pt")
            for each in (exported, engine)
        )
        assert 0 < (ours - theirs).abs().max() < 0.02


class TestBadInput:
    def refused(self, capsys, *options) -> str:
        status = main(["--model", "tiny-sd3", "--output", "/nowhere/out", *options])
        error = capsys.readouterr().err.strip()
        assert status == 2 and "\n" not in error
        return error

    def test_plugins_without_trt(self, capsys):
        assert "--plugins go with --trt" in self.refused(capsys, "--plugins")

    def test_another_runtime(self, capsys):
        error = self.refused(capsys, "--trt", "--plugins")
        assert "goes with --runtime tensorrt: TensorRT-RTX takes no kernels of ours" in error

    def test_no_tensorrt(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        error = self.refused(capsys, "--trt", "--runtime", "tensorrt", "--plugins")
        assert error.endswith("'tensorrt' is not installed: pip install tensorrt")

    def test_an_old_tensorrt(self, capsys, trt, monkeypatch):
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        monkeypatch.setattr(trt, "ICudaEngine", object, raising=False)
        error = self.refused(capsys, "--trt", "--runtime", "tensorrt")
        assert error.endswith("TensorRT 10.16.1.11 is too old: pip install 'tensorrt>=10.11'")

    def test_no_gpu(self, capsys, trt, monkeypatch):
        monkeypatch.setattr(tensorrt.torch.cuda, "is_available", lambda: False)
        error = self.refused(capsys, "--trt", "--runtime", "tensorrt")
        assert "builds engines on the GPU that will run them, and this machine has none" in error

    def test_no_triton(self, capsys, trt, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        error = self.refused(capsys, "--trt", "--runtime", "tensorrt", "--plugins")
        assert error.endswith("pip install triton")

    def test_another_gpu(self, trt):
        target = Target(("9.0",), runtime="tensorrt")
        with pytest.raises(ConfigError, match="'9.0'; TensorRT 10.16.1.11 builds on this GPU for"):
            target.check()
