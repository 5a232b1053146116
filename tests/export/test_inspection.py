"""Layers of an engine, read from what a builder says of them; test_tensorrt.py has it say so."""

from tdm_r1.export.inspection import fused_layers


def tensor(name: str, sizes: str, dtype: str) -> str:
    return (
        f"{{ Name: {name}, Dimensions: [{sizes}], Strides: [8,1], Datatype: {dtype}, Format: f }}"
    )


def layer(kind: str, inputs: str, constants: str, outputs: str) -> str:
    return (
        f"Name: a_{kind}, LayerType: {kind}, Inputs: [ {inputs}], Constants: [ {constants}],"
        f" Outputs: [ {outputs}], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: node]"
    )


def test_dtypes_by_kind():
    half, number = tensor("x", "-1,8", "BFloat16"), tensor("alpha", "1", "Float")
    lines = [
        layer("gemm", half, f"{tensor('w', '8,8', 'BFloat16')}, {number}", half),
        layer("gemm", half, number, tensor("y", "-1,8", "Float")),
        layer("kgen", f"{half}, {tensor('gate', '-1,1,8', 'Float')}", "", half),
        layer("kgen", half, "", half),
        layer("wait", "", "", ""),
        "",
        "I/O Tensors:",
        " Name: x, IOMode: Input, DataType: Int8, Dimensions: [-1,-1,8]",
    ]
    assert fused_layers("Layers:\n" + "\n".join(lines)) == {
        "gemm": {"BFloat16": 1, "BFloat16+Float": 1},
        "kgen": {"BFloat16+Float": 1, "BFloat16": 1},
    }


def test_another_message():
    assert fused_layers("Layers:\n| none |") == fused_layers("") == {}
