"""Exports run by TensorRT, as far as that goes without a GPU: a stand-in computes the engines.

Also every reason not to load an engine: no GPU, another one, another version, another file.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from bench.export import main as bench
from tdm_r1 import flow
from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, DeviceError, GraphError, LoadError
from tdm_r1.export.cli import _parser
from tdm_r1.export.parity import TOLERANCE
from tdm_r1.exported import loading, plan
from tdm_r1.exported import tensorrt as runtimes
from tdm_r1.exported.manifest import REFIT, Manifest, read_manifest, write_manifest
from tdm_r1.exported.plan import ALIGNMENT, Plan
from tdm_r1.files import sha256
from tdm_r1.graphs import FakeGraphs
from tests.export.stand_in import Queue, Specialization, StandIn, write_engine

PROMPTS = ["two red circles", 'a sign that says "go", a blue square left of it, and far below ' * 2]
ENGINES = {
    "runtime": "tensorrt-rtx",
    "version": StandIn.__version__,
    "compute_capabilities": ["8.9", "12.0"],
    "parts": {},
}


def small_manifest(**changes) -> Manifest:
    """The manifest of an export that is not there."""
    values = {
        "family": "sd3",
        "model": "some/model dir",
        "lora": "four.safetensors",
        "precision": "fp32",
        "transformer": {},
        "vae": {},
        "text": {},
        "default_size": 64,
        "shift": 3.0,
        "schedule": flow.schedule("euler", 4, 3.0),
        "axes": {"batch": (1, 3), "height": (32, 96), "width": (48, 64), "text": (2, 77)},
        **dict.fromkeys(("graphs", "files", "source", "versions", "parity"), {}),
        "fp8": None,
        "engines": ENGINES,
    }
    return Manifest(**{**values, **changes})


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of 8.9 and TensorRT-RTX, by its own account."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(runtimes, "import_tensorrt", lambda runtime: StandIn())


class TestRefusals:
    def refused(self, tmp_path, message, manifest=None, runtime="tensorrt-rtx", device="auto"):
        manifest = small_manifest() if manifest is None else manifest
        with pytest.raises(ConfigError, match=message) as caught:
            runtimes.device_of_engines(tmp_path / "ours", manifest, runtime, device)
        return str(caught.value)

    def settings(self, error: str, tmp_path):
        """What the command at the end of an error says, by the command's own parser."""
        program, *words = shlex.split(error[error.index("tdm-r1-export") :])
        found = _parser().parse_args(words)
        assert program == "tdm-r1-export" and found.output == tmp_path / "ours-rebuilt"
        return found

    def test_the_gpu_it_is_for(self, gpu, tmp_path):
        found = runtimes.device_of_engines(tmp_path, small_manifest(), "tensorrt-rtx", "cuda:0")
        assert found == torch.device("cuda:0")

    def test_no_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        self.refused(tmp_path, "needs a CUDA GPU, and this machine has none; backend='onnx' runs")

    @pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
    def test_not_installed(self, tmp_path, monkeypatch, runtime):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setitem(sys.modules, runtime.replace("-", "_"), None)
        manifest = small_manifest(engines={**ENGINES, "runtime": runtime})
        self.refused(tmp_path, f"not installed: pip install {runtime}$", manifest, runtime)

    def test_another_gpu(self, gpu, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
        message = "are for compute capability 8.9 or 12.0, and cuda has 8.6; rebuild them: "
        found = self.settings(self.refused(tmp_path, message), tmp_path)
        assert (found.runtime, found.compute_capability) == ("tensorrt-rtx", ["8.6"])
        message = "has 8.6; 8.6 has no fp8: export with --precision bf16"
        self.refused(tmp_path, message, small_manifest(precision="fp8"))

    def test_a_gpu_that_the_library_does_not_build_for(self, gpu, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        message = "cuda has 9.0; TensorRT-RTX builds for 8.6, 8.9, 12.0 only, TensorRT here: "
        for manifest in (small_manifest(), small_manifest(engines=None)):
            error = self.refused(tmp_path, message[len("cuda has 9.0") :], manifest)
            found = self.settings(error, tmp_path)
            assert (found.runtime, found.compute_capability) == ("tensorrt", None)

    def test_another_version(self, gpu, tmp_path):
        manifest = small_manifest(engines={**ENGINES, "version": "1.6.0"})
        message = "built by tensorrt-rtx 1.6.0, and 1.7.1.116 is installed: pip install"
        error = self.refused(tmp_path, message, manifest)
        assert "tensorrt-rtx==1.6.0, or rebuild" in error
        found = self.settings(error, tmp_path)
        assert found.compute_capability == ["8.9", "12.0"]
        assert (found.model, found.lora) == ("some/model dir", "four.safetensors")
        assert (found.steps, found.solver, found.batch) == (4, "euler", 3)
        assert (found.heights, found.widths, found.text) == ([32, 96], [48, 64], [2, 77])
        assert (found.trt, found.runtime, found.precision) == (True, "tensorrt-rtx", "fp32")

    def test_one_that_can_be_refitted(self, gpu, tmp_path):
        old = {**ENGINES, "version": "1.6.0"}
        for files in ({}, {REFIT: "digest"}):
            manifest = small_manifest(engines=old, files=files)
            error = self.refused(tmp_path, "built by tensorrt-rtx 1.6.0", manifest)
            assert self.settings(error, tmp_path).refit is bool(files)

    def test_another_model_of_gpu(self, gpu, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
        engines = {**ENGINES, "runtime": "tensorrt", "device": "NVIDIA L4"}
        plugins = {"transformer": {"plugins": {"swiglu_64_fp32_gate_up": {}}}}
        manifest = small_manifest(engines=engines, graphs=plugins)
        runtimes.device_of_engines(tmp_path, manifest, "tensorrt", "cuda:0")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
        message = "are for NVIDIA L4, which built them, and cuda is NVIDIA L40S; rebuild them: "
        found = self.settings(self.refused(tmp_path, message, manifest, "tensorrt"), tmp_path)
        assert (found.runtime, found.plugins, found.compute_capability) == ("tensorrt", True, None)

    def test_no_engines(self, gpu, tmp_path, monkeypatch):
        manifest = small_manifest(engines=None, lora=None)
        error = self.refused(tmp_path, "holds no engines; make some: ", manifest)
        found = self.settings(error, tmp_path)
        assert found.trt and found.lora is None and found.compute_capability == ["8.9"]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        error = self.refused(tmp_path, "holds no engines; make some: ", manifest)
        assert self.settings(error, tmp_path).compute_capability is None

    def test_engines_of_the_other_runtime(self, gpu, tmp_path):
        self.refused(tmp_path, "'tensorrt'; the engines of .* for 'tensorrt-rtx'", None, "tensorrt")

    def test_a_device_that_is_no_gpu(self, gpu, tmp_path):
        self.refused(tmp_path, "device is 'cpu'; allowed with backend='tensorrt-rtx'", device="cpu")


def test_the_stand_in_has_the_names_of_the_package():
    trt = pytest.importorskip("tensorrt_rtx")
    from tests.export import stand_in

    packaged = {"Context": trt.IExecutionContext, "Engine": trt.ICudaEngine}
    for name, theirs in {**packaged, "Refitter": trt.Refitter}.items():
        ours = {n for n in vars(getattr(stand_in, name)) if not n.startswith("_")}
        assert ours - {"output_shapes"} <= set(dir(theirs))
    for name in ("ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy"):
        assert getattr(StandIn, name).__members__.keys() == getattr(trt, name).__members__.keys()
    config = {"set_execution_context_allocation_strategy"}
    config |= {"dynamic_shapes_kernel_specialization_strategy"}
    assert config <= set(dir(trt.IRuntimeConfig))
    assert (
        trt.DataType.__members__.keys() >= plan.DTYPES.keys() >= StandIn.DataType.__members__.keys()
    )
    assert hasattr(trt.ICudaEngine, "refittable")
    assert trt.Weights(trt.DataType.FLOAT, 256, 4).size == 4


@pytest.fixture
def module(monkeypatch) -> StandIn:
    """The stand-in, in the place of the library, its device and its streams."""
    found = StandIn()
    monkeypatch.setattr(plan, "import_tensorrt", lambda runtime: found)
    monkeypatch.setattr(plan, "CudaQueue", Queue)
    monkeypatch.setattr(loading, "device_of_engines", lambda *given: torch.device("cpu"))
    return found


def with_engines(export, root):
    """A copy of an export, with an engine of the stand-in for every graph."""
    shutil.copytree(export, root)
    manifest = read_manifest(root)
    parts = {}
    for name, graph in manifest.graphs.items():
        parts[name] = {"file": f"{name}.engine"}
        write_engine(root / f"{name}.engine", root / graph["file"])
    files = {part["file"]: sha256(root / part["file"]) for part in parts.values()}
    engines = {**ENGINES, "parts": parts}
    write_manifest(root, replace(manifest, engines=engines, files={**manifest.files, **files}))
    return root


@pytest.mark.slow
class TestPictures:
    """The whole of generate() on engines, bit for bit what ONNX Runtime makes of the graphs."""

    @pytest.fixture(params=["sd3", "zimage"])
    def pair(self, request, tmp_path, module):
        root = with_engines(request.getfixturevalue(f"{request.param}_export"), tmp_path / "copy")
        graphs = FakeGraphs()
        ours = Engine.from_pretrained(root, backend="tensorrt-rtx", graphs=graphs)
        return ours, Engine.from_pretrained(root, backend="onnx"), graphs

    def same(self, pair, prompts, **settings):
        ours, theirs = (
            each.generate(prompts, seed=3, output_type="pt", **settings) for each in pair[:2]
        )
        assert torch.equal(ours, theirs)

    def test_pictures(self, pair, module):
        self.same(pair, PROMPTS)
        self.same(pair, PROMPTS, height=32, width=96)
        self.same(pair, PROMPTS)
        self.same(pair, PROMPTS[0], num_images_per_prompt=3)
        assert pair[2].num_captures == 3 and pair[2].num_replays == 4
        engines = {engine.name: engine for engine in module.engines}
        for name, engine in engines.items():
            settings = {
                c.config.dynamic_shapes_kernel_specialization_strategy for c in engine.contexts
            }
            if name in plan.RECORDED:  # a context for every set of shapes, which it keeps
                assert len(engine.contexts) >= 3 and settings == {Specialization.EAGER}
                assert {c.reshaped for c in engine.contexts} == {len(engine.inputs)}
            else:
                assert len(engine.contexts) == 1 and settings == {Specialization.LAZY}

    def test_sizes_outside_the_export(self, pair):
        with pytest.raises(ConfigError, match="height is 112; .*--heights"):
            pair[0].generate("a cat", height=112)


@pytest.mark.slow
class TestFiles:
    @pytest.fixture
    def root(self, sd3_export, tmp_path, module):
        return with_engines(sd3_export, tmp_path / "copy")

    def test_the_bench(self, root, module, sd3_dir, capsys):
        threads = str(torch.get_num_threads())
        arguments = ["--export", str(root), "--backend", "tensorrt-rtx", "--no-compile"]
        sizes = ["--batches", "1", "--repeats", "5", "--threads", threads]
        assert bench([*arguments, *sizes]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        (row,) = result["rows"]
        assert result["tensorrt-rtx"] == ENGINES["version"] and module.loads == len(module.engines)
        assert row["latent_error"]["tensorrt-rtx"] <= TOLERANCE and row["ms"]["DiT"].keys() == {
            "tensorrt-rtx", "engine",
        }  # fmt: skip

    def test_the_bench_without_engines(self, sd3_export, capsys):
        threads = ["--threads", str(torch.get_num_threads())]
        assert bench(["--export", str(sd3_export), "--backend", "tensorrt-rtx", *threads]) == 2
        assert "holds no engines; make some: tdm-r1-export" in capsys.readouterr().err

    def test_an_engine_that_was_changed_is_never_loaded(self, root, module):
        path = root / "vae_decoder.engine"
        path.write_bytes(path.read_bytes() + b"!")
        with pytest.raises(LoadError, match="vae_decoder.engine is not the file that was exported"):
            Engine.from_pretrained(root, backend="tensorrt-rtx")
        assert module.loads == 0

    def test_an_engine_that_the_library_refuses(self, root):
        path, manifest = root / "context.engine", read_manifest(root)
        path.write_bytes(b"half")
        write_manifest(root, replace(manifest, files={**manifest.files, path.name: sha256(path)}))
        message = "context.engine is refused by tensorrt_rtx: no engine at all"
        with pytest.raises(LoadError, match=message):
            Engine.from_pretrained(root, backend="tensorrt-rtx")

    def test_no_gpu(self, root, module, monkeypatch):
        monkeypatch.undo()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="tensorrt-rtx needs a CUDA GPU"):
            Engine.from_pretrained(root, backend="tensorrt-rtx")
        assert module.loads == 0

    def test_no_export(self, sd3_dir):
        with pytest.raises(LoadError, match="is no export"):
            Engine.from_pretrained(sd3_dir, backend="tensorrt-rtx")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; allowed with backend='tensorrt-rtx'"),
            ({"lora": "x.safetensors"}, "lora is 'x.safetensors': merge it with"),
            ({"steps": 8}, "steps is 8 .* made for 4 steps"),
        ],
    )
    def test_what_an_engine_cannot_do(self, root, settings, message):
        with pytest.raises(ConfigError, match=message):
            Engine.from_pretrained(root, backend="tensorrt-rtx", **settings)


class TestPlan:
    """One engine: x [batch, rows, 4] and n [batch] -> x + n, and x doubled."""

    graph = {
        "inputs": {"x": ["batch", "2*rows", 4], "n": ["batch"]},
        "outputs": {"sum": [], "double": []},
        "profile": {"x": [[1, 2, 4], [1, 4, 4], [3, 8, 4]], "n": [[1], [1], [3]]},
    }

    @pytest.fixture
    def opened(self, tmp_path, name="transformer"):
        onnx = pytest.importorskip("onnx")
        helper, dtype = onnx.helper, onnx.TensorProto
        nodes = [
            helper.make_node("Cast", ["n"], ["f"], to=dtype.FLOAT),
            helper.make_node("Unsqueeze", ["f", "axes"], ["f3"]),
            helper.make_node("Add", ["x", "f3"], ["sum"]),
            helper.make_node("Add", ["x", "x"], ["double"]),
        ]
        given = [
            helper.make_tensor_value_info("x", dtype.FLOAT, ["batch", "rows", 4]),
            helper.make_tensor_value_info("n", dtype.INT64, ["batch"]),
        ]
        made = [
            helper.make_tensor_value_info(out, dtype.FLOAT, ["batch", "rows", 4])
            for out in ("sum", "double")
        ]
        axes = helper.make_tensor("axes", dtype.INT64, [2], [1, 2])
        graph = helper.make_graph(nodes, "small", given, made, [axes])
        opset = helper.make_opsetid("", 20)
        path = tmp_path / f"{name}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
        write_engine(tmp_path / f"{name}.engine", path)
        module, queue = StandIn(), Queue()
        engine = tmp_path / f"{name}.engine"
        return Plan(module, engine, self.graph, torch.device("cpu"), queue), module, queue

    def run(self, opened, batch=2, rows=4):
        x, n = torch.randn(batch, rows, 4), torch.arange(batch)
        total, double = opened[0](x, n)
        assert torch.equal(total, x + n[:, None, None]) and torch.equal(double, 2 * x)

    def test_outputs(self, opened):
        self.run(opened)
        self.run(opened, 3, 8)

    def test_strided_inputs_and_other_dtypes(self, opened):
        x, n = torch.randn(4, 4, 2).permute(2, 0, 1), torch.arange(2, dtype=torch.int32)
        total, _ = opened[0](x, n)
        assert torch.equal(total, x + n[:, None, None])

    def test_a_context_for_every_set_of_shapes(self, opened):
        for _ in range(2):
            self.run(opened, 2, 4)
            self.run(opened, 2, 6)
        (engine,) = opened[1].engines
        assert [(c.calls, c.reshaped) for c in engine.contexts] == [(2, 2), (2, 2)]

    @pytest.mark.parametrize(
        ("x", "n", "message"),
        [
            ((4, 4, 4), (4,), "axis 0 of x is 4; allowed in this engine: 1 to 3 .*--batch makes"),
            ((2, 10, 4), (2,), "axis 1 of x is 10; allowed .* 2 to 8 .*--heights makes another"),
            ((2, 4, 5), (2,), r"axis 2 of x is 5; allowed in this engine: 4 to 4$"),
            ((2, 4), (2,), r"x is \[2, 4\]; allowed: 3 axes"),
        ],
    )
    def test_shapes_outside_the_profile(self, opened, x, n, message):
        with pytest.raises(ConfigError, match=f"transformer: {message}"):
            opened[0](torch.zeros(x), torch.zeros(n, dtype=torch.int64))
        assert not opened[1].engines[0].contexts

    def test_a_library_that_fails(self, opened):
        self.run(opened)
        (context,) = opened[1].engines[0].contexts
        context.fails = "out of luck"
        with pytest.raises(DeviceError, match="'transformer' failed to run: out of luck"):
            self.run(opened)

    def test_what_cannot_be_recorded(self, opened):
        self.run(opened)
        opened[2].recording = True
        self.run(opened)
        opened[1].engines[0].contexts[0].capturable = False
        with pytest.raises(GraphError, match="'transformer' cannot be recorded"):
            self.run(opened)

    def test_inputs_are_bound_where_they_are(self):
        buffer = torch.zeros(4 * ALIGNMENT)
        first = -buffer.data_ptr() // 4 % (ALIGNMENT // 4)
        x = buffer[first : first + 64]
        assert plan._bindable(x).data_ptr() == x.data_ptr()
        assert plan._bindable(x[1:]).data_ptr() != x[1:].data_ptr()
