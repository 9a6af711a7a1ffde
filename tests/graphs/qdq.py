"""Convolutions quantised as exporters do it: activations, weights and biases through QuantizeLinear and DequantizeLinear."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

# by name: what is made, and how many QuantizeLinear and DequantizeLinear of it TensorRT can take as they are
KINDS: dict[str, tuple[dict, int]] = {
    "uint8 around 128": ({}, 4 + 1),
    "uint8 around 128, moved": ({"moved": True}, 4 + 1),
    "uint8 around 117": ({"zero": 117, "weight_zero": 3}, 0),
    "uint8 around 117, moved": ({"zero": 117, "weight_zero": 3, "moved": True}, 0),
    "uint8 around 0, weights by channel": ({"zero": 0, "by_channel": True}, 1),
    "uint8 at its ends": ({"zero": 130, "ends": True}, 1),
    "int8 around -7": ({"kind": np.int8, "zero": -7, "weight_zero": 0}, 1),
    "int16": ({"kind": np.int16, "zero": 0, "weight_zero": 0}, 0),
    "float16 and uint8 around 99": ({"zero": 99, "half": True, "bias": False}, 1),
}


def quantised_convolution(
    kind: type = np.uint8, zero: int = 128, weight_zero: int = 128, *, by_channel: bool = False, moved: bool = False,
    ends: bool = False, half: bool = False, bias: bool = True,
) -> onnx.ModelProto:  # fmt: skip
    """`kind`: of the integers; `zero`, `weight_zero`: zero points; `by_channel`: a scale for each output channel; `moved`: a
    Transpose between; `ends`: integers as input and output."""
    rng = np.random.default_rng(0)
    float_type = np.float16 if half else np.float32
    floats, integers = (helper.np_dtype_to_tensor_dtype(np.dtype(each)) for each in (float_type, kind))
    channels = (4,) if by_channel else ()
    limits = np.iinfo(kind)
    constants = {
        "s": np.array(0.03, float_type),
        "z": np.array(zero, kind),
        "W": rng.integers(limits.min, limits.max + 1, (4, 3, 3, 3)).astype(kind),
        "ws": (rng.random(channels) * 0.01 + 0.001).astype(float_type),
        "wz": np.full(channels, weight_zero, kind),
        "B": rng.integers(-1000, 1000, 4).astype(np.int32),
        "bs": np.array(0.0003, float_type),
    }
    x = helper.make_tensor_value_info("x", integers if ends else floats, ["B", 3, 6, 6])
    nodes = [] if ends else [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    small = "x" if ends else "q"
    if moved:
        nodes.append(helper.make_node("Transpose", [small], ["turned"], perm=[0, 1, 3, 2]))
        small = "turned"
    nodes.append(helper.make_node("DequantizeLinear", [small, "s", "z"], ["xd"]))
    nodes.append(helper.make_node("DequantizeLinear", ["W", "ws", "wz"], ["wd"], axis=0))
    if bias:
        nodes.append(helper.make_node("DequantizeLinear", ["B", "bs"], ["bd"]))
    nodes.append(helper.make_node("Conv", ["xd", "wd", *["bd"] * bias], ["c"]))
    nodes.append(helper.make_node("QuantizeLinear", ["c", "s", "z"], ["y" if ends else "cq"]))
    if not ends:
        nodes.append(helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["y"]))
    y = helper.make_tensor_value_info("y", integers if ends else floats, ["B", 4, 4, 4])
    weights = [numpy_helper.from_array(values, name) for name, values in constants.items() if bias or name[0] not in "Bb"]
    imports = [helper.make_opsetid("", 21 if half or kind in (np.int16, np.uint16) else 13)]
    graph = helper.make_graph(nodes, "quantised", [x], [y], weights)
    return helper.make_model(graph, opset_imports=imports, ir_version=10 if half else 9)
