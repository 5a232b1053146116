"""A classic TensorRT that builds for a GPU which is not there, to test what is asked of it.

It has the calls that `tdm_r1.export.tensorrt` makes, under the names that TensorRT 10.11 to 11.4
have in common. Its parser asks for plugins as NVIDIA's does, and takes a node's body where there is
none; its builder launches nothing, but works out every plugin's launch at every shape of a profile.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

from tests.export.plugin_stand_in import DataType, Launched, PluginModule
from tests.export.stand_in import StandIn

Flag = IntEnum(
    "Flag",
    ["STRONGLY_TYPED", "PREFER_JIT_PYTHON_PLUGINS", "PREFER_AOT_PYTHON_PLUGINS"],
)
BuilderFlag = IntEnum("BuilderFlag", ["REFIT", "TF32"])
_TYPES = {
    onnx.TensorProto.FLOAT: DataType.FLOAT,
    onnx.TensorProto.FLOAT16: DataType.HALF,
    onnx.TensorProto.BFLOAT16: DataType.BF16,
    onnx.TensorProto.INT64: DataType.INT64,
}


class Monitor:
    """IProgressMonitor: to be derived from."""


class Config:
    """IBuilderConfig, as new: TF32 is on."""

    def __init__(self) -> None:
        self.__dict__["flags"] = {BuilderFlag.TF32}
        self.__dict__["profiles"] = []

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in ("progress_monitor", "profiling_verbosity"), f"no {name} here"
        self.__dict__[name] = value

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple] = {}

    def set_shape(self, name: str, low: list, typical: list, high: list) -> None:
        self.shapes[name] = (low, typical, high)


class Layer:
    num_outputs = 1

    def __init__(self, kind: str, node: Any, dtype: DataType) -> None:
        self.type, self.node, self.dtype = SimpleNamespace(name=kind), node, dtype

    def get_output_type(self, index: int) -> DataType:
        return self.dtype


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = {flag for flag in Flag if flags & 1 << flag}
        self.layers: list[Layer] = []
        self.path = Path()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


class Parser:
    """For every node a layer; of a node that is a function one for every node of its body."""

    def __init__(self, network: Network, plugins: PluginModule) -> None:
        self.network, self.plugins = network, plugins

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path, load_external_data=False)
        self.network.path = Path(path)
        functions = {(f.domain, f.name): f for f in model.functions}
        for node in model.graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            namespace = attributes.get("plugin_namespace", b"").decode()
            plugin = self.plugins.plugins.get(f"{namespace}::{node.op_type}")
            if namespace and plugin is not None:
                assert attributes.keys() == {"plugin_namespace", "aot"} and attributes["aot"] == 1
                assert len(node.input) == len(plugin.inputs)
                assert len(node.output) == plugin.num_outputs
                self.network.layers.append(Layer("PLUGIN_V3", node, DataType.FLOAT))
            elif (node.domain, node.op_type) in functions:
                body = functions[node.domain, node.op_type].node
                self.network.layers += [Layer("BODY", each, DataType.FLOAT) for each in body]
            else:
                assert not node.domain, f"{node.op_type} of {node.domain}"
                self.network.layers.append(Layer(node.op_type.upper(), node, DataType.FLOAT))
        return True


class TensorRT(StandIn):
    """The module, and `tensorrt.plugin` as its `plugins`.

    `launches`: by graph, (op, the shapes of its inputs, launch) of every plugin at every shape.
    """

    __name__ = "tensorrt"
    __version__ = "10.16.1.11"
    NetworkDefinitionCreationFlag = Flag
    BuilderFlag = BuilderFlag
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    IProgressMonitor = Monitor
    ICudaEngine = SimpleNamespace(create_runtime_config=None)

    def __init__(self) -> None:
        super().__init__()
        self.plugins = PluginModule()
        self.networks: list[Network] = []
        self.configs: list[Config] = []
        self.launches: dict[str, list[tuple[str, list[tuple], Launched]]] = {}

    def Builder(self, logger: Any) -> SimpleNamespace:
        def create_network(flags: int) -> Network:
            self.networks.append(Network(flags))
            return self.networks[-1]

        def create_config() -> Config:
            self.configs.append(Config())
            return self.configs[-1]

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=create_config,
            create_optimization_profile=Profile,
            build_serialized_network=self._build,
        )

    def OnnxParser(self, network: Network, logger: Any) -> Parser:
        return Parser(network, self.plugins)

    def _build(self, network: Network, config: Config) -> bytes:
        assert Flag.STRONGLY_TYPED in network.flags and BuilderFlag.TF32 not in config.flags
        (profile,) = config.profiles
        own = [layer.node for layer in network.layers if layer.type.name == "PLUGIN_V3"]
        assert not own or Flag.PREFER_AOT_PYTHON_PLUGINS in network.flags
        found = self.launches.setdefault(network.path.stem, [])
        for bound in range(3) if own else ():
            seen = _values(network.path, own, {name: s[bound] for name, s in profile.items()})
            for node in own:
                dtypes = [seen[name][0] for name in node.input]
                shapes = [seen[name][1] for name in node.input]
                plugin = self.plugins.plugins[f"tdm_r1::{node.op_type}"]
                found.append((node.op_type, shapes, plugin.launch(dtypes, shapes)))
                # Outputs are said to be like the first input: the graph has to agree.
                assert {seen[name] for name in node.output} == {seen[node.input[0]]}
        return b"stand-in:" + str(network.path).encode()


def _values(path: Path, nodes: list, sizes: dict[str, list[int]]) -> dict[str, tuple]:
    """(dtype, shape) of every value around `nodes`, when ONNX Runtime runs the graph's bodies."""
    import onnxruntime

    model = onnx.load(path)
    names = sorted({name for node in nodes for name in (*node.input, *node.output)})
    held = {w.name: (_TYPES[w.data_type], tuple(w.dims)) for w in model.graph.initializer}
    outside = {given.name for given in model.graph.input}
    asked = [name for name in names if name not in held and name not in outside]
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in asked)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {
        given.name: np.ones(sizes[given.name], np.int64 if "int64" in given.type else np.float32)
        for given in session.get_inputs()
    }
    made = dict(zip(asked, session.run(asked, feed), strict=True))
    dtypes = {np.dtype(np.float32): DataType.FLOAT, np.dtype(np.float16): DataType.HALF}
    found = {name: (dtypes[array.dtype], array.shape) for name, array in made.items()}
    return {**held, **found, **{name: (DataType.FLOAT, tuple(sizes[name])) for name in outside}}
