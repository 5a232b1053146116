"""One exported graph on ONNX Runtime, tensors in and out. The owner of `onnxruntime`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdm_r1.errors import ConfigError


def import_runtime() -> Any:
    """Return the `onnxruntime` module; ConfigError when it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError("exports run on ONNX Runtime: pip install onnxruntime") from error
    return onnxruntime


class Session:
    """An ONNX graph on the CPU, with as many threads as PyTorch has."""

    in_place = False

    def __init__(self, path: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Raises ConfigError when ONNX Runtime is not installed.

        `weights` stand in place of its own of these names, which must lie in the file beside the
        graph: any other the runtime may have folded away.
        """
        self.path = path
        onnxruntime = import_runtime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads that spin would take the cores of PyTorch's, which work between the graphs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        weights = weights or {}
        arrays = [weight.detach().contiguous().numpy() for weight in weights.values()]
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        if values:
            options.add_external_initializers(list(weights), values)
        self._session = onnxruntime.InferenceSession(
            str(self.path), options, providers=["CPUExecutionProvider"]
        )
        self._weights = values  # theirs is the memory that the session reads
        self._names = [given.name for given in self._session.get_inputs()]

    def refit(self, weights: Mapping[str, Tensor]) -> Session:
        """Open the graph anew with `weights`; none: as it is stored. This one stays as it is."""
        return Session(self.path, weights)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for `inputs`, both in the graph's order."""
        feed = {
            name: tensor.detach().contiguous().numpy()
            for name, tensor in zip(self._names, inputs, strict=True)
        }
        return tuple(torch.from_numpy(output) for output in self._session.run(None, feed))
