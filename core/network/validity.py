"""What an input's numbers may be, as far as the graph shows it: indices below a table's length, masks, counts.

An input is followed through what only moves or casts it to the operators that read it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx

from suture.core.additive_mask import FAR_BELOW
from suture.core.subgraphs import all_nodes
from suture.core.traits import MICROSOFT, STANDARD

MOVES = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Flatten", "Expand", "Slice", "Concat", "Tile",
         "Split")  # fmt: skip
LOGIC = ("Not", "And", "Or")
CLAMPS = ("Add", "Max", "Min", "Where")  # behind which an index is likely one still
COUNTS = {"Loop": 0, "TopK": 1, "Range": 1, "Tile": 1, "Expand": 1, "ConstantOfShape": 0, "Reshape": 1}
PADDING = {"Attention": 3, "MultiHeadAttention": 4, "EmbedLayerNormalization": 7}  # inputs of onnxruntime's operators
VALID = 6  # Attention's nonpad_kv_seqlen: without any valid slot nothing is seen
MASK = re.compile(r"mask|attn_bias", re.IGNORECASE)


@dataclass(frozen=True)
class Use:
    """`below`: an index into an axis of that length. `mask`: 1 where something may be seen; `hides`: 0 there, as of a padding
    mask; `additive`: 0 there, too. `count`: of iterations, or a length."""

    below: int | None = None
    mask: bool = False
    additive: bool = False
    count: bool = False
    hides: bool = False


def uses_of_inputs(model: onnx.ModelProto) -> dict[str, Use]:
    """Of each input that is not an initializer."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    shapes = _shapes(model)
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in all_nodes(model.graph):
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, place))
    constants = dict(_small_constants(model.graph))
    inputs = [value for value in model.graph.input if value.name not in initializers]
    return {value.name: _use(value, readers, shapes, constants) for value in inputs}


def _use(value: onnx.ValueInfoProto, readers: dict, shapes: dict, constants: dict) -> Use:
    floating = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).kind not in "iub"
    below, inverted, count, padding = None, False, False, False
    lengths = len(value.type.tensor_type.shape.dim) == 1  # of padding
    masks: set[bool] = set()  # whether true hides, at each place where it does
    waiting, seen = [(value.name, False)], set()
    while waiting:
        name, negated = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for node, place in readers.get(name, ()):
            if not floating and (hides := _hides(node, place, constants)) is not None:
                masks.add(hides != negated)
            if not floating and (length := _length(node, place, shapes)) is not None:
                below = length if below is None else min(below, length)
            if node.domain == MICROSOFT and PADDING.get(node.op_type) == place:
                padding, count = not lengths, count or lengths
            if COUNTS.get(node.op_type) == place and name == value.name:
                count = True
            if node.op_type == "Attention" and node.domain in STANDARD and place == VALID:
                count = True
            if node.op_type == "Sub" and place == 1 and constants.get(node.input[0]) == 1:
                inverted = True  # (1 - mask) · lowest
            if (
                (node.op_type in MOVES or (node.op_type in CLAMPS and not floating)) and place == 0
            ) or node.op_type == "Concat":
                waiting += [(output, negated) for output in node.output]
            elif node.op_type in LOGIC and not floating:
                waiting.append((node.output[0], negated != (node.op_type == "Not")))
    if len(masks) == 1:
        return Use(below, masks == {False}, False, count, masks == {True})
    named = MASK.search(value.name) is not None
    return Use(below, inverted or padding or (named and not floating), named and floating and not inverted, count)


def _hides(node: onnx.NodeProto, place: int, constants: dict[str, float]) -> bool | None:
    """Whether scores are hidden where this input is true; None where it hides none."""
    if node.op_type == "Attention" and node.domain in STANDARD and place == 3:
        return False
    if node.op_type != "Where" or place != 0:
        return None
    hidden = [constants.get(name, 0.0) <= FAR_BELOW for name in node.input[1:3]]
    return hidden[0] if hidden[0] != hidden[1] else None


def _length(node: onnx.NodeProto, place: int, shapes: dict) -> int | None:
    """The length of the axis that this input of the node points into; None where it does not, or nobody knows."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    table = shapes.get(node.input[0]) if node.input else None
    if node.op_type in ("Gather", "GatherElements", "ScatterElements") and place == 1 and table:
        return table[axis] if -len(table) <= axis < len(table) and isinstance(table[axis], int) else None
    if node.op_type in ("GatherND", "ScatterND") and place == 1 and table:
        known = [size for size in table if isinstance(size, int)]
        return min(known, default=None)
    if node.op_type == "RotaryEmbedding":
        domain = node.domain == "com.microsoft"
        cos = shapes.get(node.input[2 if domain else 1])
        if place == (1 if domain else 3) and cos and isinstance(cos[0], int):
            return cos[0]
    if node.op_type == "EmbedLayerNormalization" and place in (0, 1):
        words = shapes.get(node.input[2 if place == 0 else 4])
        return words[0] if words and isinstance(words[0], int) else None
    return None


def _shapes(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # operators that onnx does not know, or a file too large for one message
        graph = model.graph
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for value in (*graph.value_info, *graph.input):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes.setdefault(value.name, [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims])
    for name, tensor in _constants(model.graph):
        shapes.setdefault(name, list(tensor.dims))
    return shapes


def _small_constants(graph: onnx.GraphProto) -> Iterator[tuple[str, float]]:
    tensors = [(tensor.name, tensor) for tensor in graph.initializer]
    for name, tensor in [*tensors, *_constants(graph)]:
        if int(np.prod(tensor.dims)) == 1 and tensor.data_location != onnx.TensorProto.EXTERNAL:
            yield name, float(onnx.numpy_helper.to_array(tensor).astype(np.float32).reshape(()))


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in all_nodes(graph):
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t
