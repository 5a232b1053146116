"""LoRAs changed in an export: names, the weights of a fresh export, and no residue of any other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, DeviceError, ExportError, LoadError
from tdm_r1.export import precision
from tdm_r1.export.cli import main
from tdm_r1.export.graphs import Axis, Graph
from tdm_r1.export.onnx_graph import write_graph
from tdm_r1.exported import refit
from tdm_r1.exported.manifest import REFIT, read_manifest, write_manifest
from tdm_r1.exported.plan import Plan
from tdm_r1.exported.session import Session
from tdm_r1.exported.transformer import ExportedSD3
from tdm_r1.files import sha256
from tdm_r1.models.lora import TARGETS, LoraTensors, find_targets
from tdm_r1.models.lora_files import WEIGHTS_NAME, write_lora
from tdm_r1.pipeline import ASSETS, load_pipeline
from tests.export.stand_in import Queue, StandIn, write_engine
from tests.export.test_runtime import module, small_manifest, with_engines  # noqa: F401

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

BUNDLED = ASSETS / "tiny-zimage" / WEIGHTS_NAME


def random_lora(path, model: nn.Module, targets, rank: int = 3) -> str:
    """A LoRA of some of a model's linears, as a file."""
    draw = torch.Generator().manual_seed(5)
    tensors = {
        name: LoraTensors(
            torch.randn(rank, linear.weight.shape[1], generator=draw),
            0.02 * torch.randn(linear.weight.shape[0], rank, generator=draw),
            0.5,
        )
        for name, linear in find_targets(model, targets).items()
    }
    return str(write_lora(path, tensors))


class Twins(nn.Module):
    """Two linears of equal weights, one that is folded away, and one with a bias on two axes."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.one, self.two, self.folded = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.flat = nn.Linear(16, 16)
        for linear in (self.one, self.folded, self.flat):
            linear.weight.data = torch.randn(16, 16, generator=draw)
        self.two.weight.data = self.one.weight.data.clone()

    def forward(self, x):
        return self.flat(self.two(self.one(x)).sum(1)) + self.folded(torch.ones(1, 16))


class TestNames:
    @pytest.fixture
    def written(self, tmp_path):
        twins, inputs = Twins(), {"x": (Axis.ranging("batch", 1, 4, 2), 3, 16)}
        graph = Graph("part", twins, inputs, ("y",))
        return twins, tmp_path, write_graph(graph, tmp_path, refit=True)

    def test_every_linear_has_an_initializer_of_its_name(self, written):
        twins, root, entry = written
        model = onnx.load(root / entry["file"])
        stored = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
        assert {"one.weight", "two.weight", "flat.weight"} == entry["weights"].keys()
        for name, found in entry["weights"].items():
            weight = twins.get_parameter(found["weight"])
            weight = weight.T if found["transposed"] else weight
            assert torch.equal(torch.tensor(stored[name]), weight)
        assert not entry["weights"]["flat.weight"]["transposed"]  # a Gemm

    def test_equal_weights_are_replaced_one_by_one(self, written):
        twins, root, entry = written
        x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
        session = Session(root / entry["file"])
        before = session(x)[0]
        torch.testing.assert_close(before, twins(x), rtol=1e-5, atol=1e-5)
        twins.two.weight.data = torch.eye(16)
        other = session.refit({"two.weight": torch.eye(16)})
        torch.testing.assert_close(other(x)[0], twins(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(session(x)[0], before)
        assert torch.equal(other.refit({})(x)[0], before)

    def test_tensorrt_knows_the_names(self, written):
        # Without a GPU as far as it goes: the parser's network, which names what can be replaced.
        trt = pytest.importorskip("tensorrt_rtx")
        _, root, entry = written
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(typed)
        assert trt.OnnxParser(network, logger).parse_from_file(str(root / entry["file"]))
        assert all(network.mark_weights_refittable(name) for name in entry["weights"])
        assert not network.mark_weights_refittable("folded.weight")

    def test_an_initializer_that_is_not_the_weight(self, tmp_path):
        class Doubled(nn.Linear):
            def forward(self, x):
                return x @ (2 * self.weight).T

        inputs = {"x": (Axis.ranging("batch", 1, 4, 2), 16)}
        graph = Graph("part", nn.Sequential(Doubled(16, 16)), inputs, ("y",))
        with pytest.raises(ExportError, match="is not the weight that 0.weight multiplies by"):
            write_graph(graph, tmp_path)


class TestWeights:
    """What is put in place, against the model as it is loaded with the LoRA."""

    @pytest.fixture
    def made(self, sd3_dir, tmp_path):
        """An export's folder and manifest, of the one graph that holds all linears."""
        from safetensors.torch import save_file

        from tdm_r1.models.loading import load_transformer, read_json

        def make(name):
            model = load_transformer(sd3_dir)
            linears = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)]
            linears = [n for n in linears if "timestep_embedder" not in n]
            save_file({n: model.get_parameter(n).detach() for n in linears}, tmp_path / REFIT)
            entries = {f"model.{n}": {"weight": n, "transposed": "ff" in n} for n in linears}
            graphs = {"context": {"weights": {}}, "transformer": {"weights": entries}}
            config = read_json(sd3_dir / "transformer" / "config.json")
            return small_manifest(transformer=config, graphs=graphs, precision=name), model

        return make

    @pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
    def test_bits(self, made, sd3_dir, tmp_path, name):
        manifest, model = made(name)
        lora = random_lora(tmp_path / "lora.safetensors", model, ("to_q", "to_out.0", "net.2"))
        ours = refit.merged_weights(tmp_path, manifest, lora)["transformer"]
        if name == "fp32":
            pipeline = load_pipeline(sd3_dir, lora=lora, device="cpu", dtype="float32")
        else:
            pipeline = precision.load_low(sd3_dir, lora, name)
        changed = 0
        for key, entry in manifest.graphs["transformer"]["weights"].items():
            theirs = pipeline.transformer.get_parameter(entry["weight"])
            found = ours[key].T if entry["transposed"] else ours[key]
            assert found.dtype == precision.DTYPES[name] and torch.equal(found, theirs)
            assert ours[key].is_contiguous()
            changed += not torch.equal(found, model.get_parameter(entry["weight"]).to(found.dtype))
        assert changed == (3 + 1) + (3 + 1) + (3 + 2)

    def test_what_the_graphs_hold_as_constants(self, made, tmp_path):
        manifest, model = made("fp32")
        targets = ("attn.to_q", "timestep_embedder.linear_1")
        lora = random_lora(tmp_path / "lora.safetensors", model, targets)
        message = "as constants: time_text_embed.timestep_embedder.linear_1; merge it with"
        with pytest.raises(ConfigError, match=message):
            refit.merged_weights(tmp_path, manifest, lora)

    def test_a_lora_of_another_model(self, made, tmp_path):
        manifest, _ = made("fp32")
        with pytest.raises(LoadError, match="LoRA does not fit this model: .*attention.to_q"):
            refit.merged_weights(tmp_path, manifest, BUNDLED)


@pytest.mark.slow
class TestExports:
    """tiny-zimage, exported with its LoRA: bit for bit what a fresh export with it computes."""

    @pytest.fixture(params=["onnx", "tensorrt-rtx"])
    def opened(self, request, zimage_export, tmp_path):
        if request.param == "onnx":
            return Engine.from_pretrained(zimage_export, backend="onnx")
        request.getfixturevalue("module")
        root = with_engines(zimage_export, tmp_path / "copy")
        return Engine.from_pretrained(root, backend="tensorrt-rtx")

    @pytest.fixture
    def other(self, tmp_path):
        model = load_pipeline("tiny-zimage-base", device="cpu", dtype="float32").transformer
        targets = (*TARGETS["zimage"], "w1", "linear", "cap_embedder.1")
        return random_lora(tmp_path / "other.safetensors", model, targets)

    def draw(self, engine):
        return engine.generate(["two red circles"], seed=3, output_type="pt")

    def test_there_and_back(self, opened, other):
        own = self.draw(opened)
        opened.refit(other)
        theirs = Engine.from_pretrained("tiny-zimage", lora=other, device="cpu")
        changed = self.draw(opened)
        assert (changed - self.draw(theirs)).abs().max() < 1e-4
        assert (changed - own).abs().max() > 0.01
        opened.refit(BUNDLED)  # the one it was exported with: its graphs hold a fresh export's bits
        assert torch.equal(self.draw(opened), own) and opened.pipeline.lora == BUNDLED
        opened.refit(other)
        assert torch.equal(self.draw(opened), changed)
        opened.refit(None)
        assert torch.equal(self.draw(opened), own) and opened.pipeline.lora is None

    def test_a_lora_of_another_model_changes_nothing(self, opened):
        own = self.draw(opened)
        with pytest.raises(LoadError, match="LoRA does not fit this model: "):
            opened.refit(ASSETS / "tiny-sd3" / WEIGHTS_NAME)
        assert torch.equal(self.draw(opened), own)

    def test_names_are_those_of_the_model(self, zimage_export):
        manifest = read_manifest(zimage_export)
        model = load_pipeline("tiny-zimage", device="cpu", dtype="float32").transformer
        held = {e["weight"] for p in refit.PARTS for e in manifest.graphs[p]["weights"].values()}
        linears = {n for n, part in model.named_modules() if isinstance(part, nn.Linear)}
        # All of the schedule's modulation is a constant table.
        tables = {n for n in linears if "adaLN" in n or "t_embedder" in n}
        assert {n.removesuffix(".weight") for n in held} == linears - tables
        assert {f"{part}.onnx.data" for part in refit.PARTS} < manifest.files.keys()

    def test_an_export_without(self, zimage_export, tmp_path):
        root = shutil.copytree(zimage_export, tmp_path / "copy")
        (root / REFIT).unlink()
        with pytest.raises(LoadError, match=f"lacks {REFIT}"):
            Engine.from_pretrained(root)
        manifest = read_manifest(zimage_export)
        files = {name: digest for name, digest in manifest.files.items() if name != REFIT}
        write_manifest(root, replace(manifest, files=files))
        with pytest.raises(ConfigError, match="cannot be refitted: make it by tdm-r1-export --ref"):
            Engine.from_pretrained(root).refit(BUNDLED)


def test_a_model_that_is_no_export(sd3_dir):
    with pytest.raises(ConfigError, match="is no export, and only those are refitted"):
        Engine.from_pretrained(sd3_dir, device="cpu").refit(BUNDLED)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_library_that_fails_leaves_no_mixture(in_place, monkeypatch, tmp_path):
    class Part:
        def __init__(self, fails: bool) -> None:
            self.fails, self.given, self.in_place = fails, [], in_place

        def refit(self, weights):
            self.given.append(weights)
            if weights and self.fails:
                raise DeviceError("the engine failed")
            return self if in_place else Part(fails=False)

    transformer = ExportedSD3.__new__(ExportedSD3)
    nn.Module.__init__(transformer)
    (tmp_path / REFIT).write_bytes(b"weights")
    transformer.manifest = small_manifest(files={REFIT: sha256(tmp_path / REFIT)})
    parts = transformer.encode, transformer.step = Part(fails=False), Part(fails=True)
    pipeline = SimpleNamespace(transformer=transformer, path=tmp_path, lora="one.safetensors")
    weights = {part: {"a.weight": torch.zeros(1)} for part in refit.PARTS}
    monkeypatch.setattr(refit, "merged_weights", lambda *given: weights)
    with pytest.raises(DeviceError, match="the engine failed"):
        refit.refit(pipeline, "other.safetensors")
    assert (transformer.encode, transformer.step) == parts
    for part in parts:  # engines go back to what they were made with, graphs stay as they are
        assert part.given[0] and part.given[1:] == ([{}] if in_place else [])
    assert pipeline.lora == (None if in_place else "one.safetensors")
    (tmp_path / REFIT).write_bytes(b"others")
    with pytest.raises(LoadError, match=f"{REFIT} is not the file that was exported"):
        refit.refit(pipeline, "other.safetensors")
    assert len(parts[0].given) == 1 + in_place


class TestPlan:
    """An engine of the stand-in that multiplies x [batch, 16] by "0.weight"."""

    @pytest.fixture
    def plan(self, tmp_path):
        inputs = {"x": (Axis.ranging("batch", 1, 4, 2), 16)}
        linear = nn.Linear(16, 16, bias=False)
        graph = Graph("transformer", nn.Sequential(linear), inputs, ("y",))
        entry = write_graph(graph, tmp_path, refit=True)
        write_engine(tmp_path / "transformer.engine", tmp_path / entry["file"])
        engine = tmp_path / "transformer.engine"
        return Plan(StandIn(), engine, entry, torch.device("cpu"), Queue()), linear

    def test_weights_are_replaced_in_the_engine_and_read_anew(self, plan):
        opened, linear = plan
        x = torch.randn(2, 16)
        own = opened(x)[0]
        torch.testing.assert_close(own, linear(x))
        contexts = dict(opened._contexts)
        opened.refit({"0.weight": torch.eye(16)})
        assert torch.equal(opened(x)[0], x) and opened.queue.waits == 1
        assert opened._contexts == contexts  # they stay valid
        opened.refit({})
        assert torch.equal(opened(x)[0], own) and opened._module.loads == 2

    def test_an_engine_that_was_not_built_for_it(self, plan):
        plan[0]._engine.refittable = False
        message = "'transformer' cannot be refitted: build it by tdm-r1-export --trt --refit"
        with pytest.raises(ConfigError, match=message):
            plan[0].refit({"0.weight": torch.eye(16)})

    def test_what_the_library_refuses(self, plan):
        with pytest.raises(DeviceError, match="failed to take 1.weight: no such weights: 1.weight"):
            plan[0].refit({"1.weight": torch.eye(16)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU cannot do")
@pytest.mark.parametrize("capabilities", ["8.9 12.0", "8.9"])
def test_refittable_engines_need_a_gpu(capsys, tmp_path, sd3_dir, capabilities):
    trt = pytest.importorskip("tensorrt_rtx")
    command = ["--model", str(sd3_dir), "--output", str(tmp_path / "out"), "--trt", "--refit"]
    assert main([*command, "--compute-capability", *capabilities.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert f"--refit: TensorRT-RTX {trt.__version__} builds no engine here" in error
    # Which of its own checks fails, the library leaves to chance.
    assert "CHECK(" in error and error.endswith("or leave out --trt") and "\n" not in error
    assert not list(tmp_path.iterdir())
