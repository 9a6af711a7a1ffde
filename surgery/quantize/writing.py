"""Quantised products and tables, written into the graph; their weights are read, rounded and written a slab at a time.

    Gemm(x, W, b, transB=1)  →  x @ DequantizeLinear(q [in, out], scales) + b
    Gather(table, tokens)    →  Gather(DequantizeLinear(q [rows, features], scales [rows]), tokens)

In this form, a MatMul over weights that lie as [in, out], onnxruntime fuses the pair into one product (MatMulNBits, on the
CPU and on CUDA, from the optimisation level "extended" on), where the scales are constants of type float16 or float32,
the blocks lie along axis 0 and are of 16 to 256, a power of two, or each output has one scale; and TensorRT reads the
small weight in the product's own kernel.
"""

import numpy as np
import onnx_graphsurgeon as gs
import torch
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues

from suture.surgery.graph import Graph, NoMatch, need, onnx_type
from suture.surgery.graph.weights import add_weight, read_array
from suture.surgery.quantize.formats import BLOCKS, Format, Values
from suture.surgery.quantize.linears import Linear
from suture.surgery.quantize.rounding import block_scales, from_numpy, packed, quantise, scales_of, to_bytes
from suture.surgery.quantize.slabs import balanced_slabs, slabs


def write_linear(graph: Graph, linear: Linear, form: Format, group_size: int, x: gs.Tensor) -> None:
    """Replaces the product by one with a dequantised weight, of the input `x`. Raises NoMatch where the format has no
    room for its sizes."""
    block, name = block_for(linear, form, group_size), linear.node.name
    q, scales = linear.rounded or round_linear(graph, linear, form, group_size)
    attrs = {"axis": 0, "block_size": block} if form.blocks else {"axis": 1}
    weight = graph.new("DequantizeLinear", [q, scales], attrs, f"{name}/weight", linear.dtype, q.shape)
    result = linear.node.outputs[0]
    if linear.bias is None:
        graph.replace(result, "MatMul", [x, weight], name=name)
        return
    product = graph.new("MatMul", [x, weight], name=name, dtype=onnx_type(result), shape=result.shape)
    graph.replace(result, "Add", [product, scaled_vector(graph, linear.bias, linear.rows)], name=f"{name}/bias")


def round_linear(graph: Graph, linear: Linear, form: Format, group_size: int) -> tuple[gs.Constant, gs.Constant]:
    """The product's weight as q [in, out] and its scales, [in / block, out] or [out], added to the graph's weights."""
    block = block_for(linear, form, group_size)
    data, scales = _rounded(graph, linear, form.values, block)
    shape, blocks = [linear.features, linear.outputs], [linear.features // block] * form.blocks
    q = add_weight(graph, f"{linear.weight.name}_q", form.values.dtype, shape, iter([data]))
    return q, add_weight(graph, f"{linear.weight.name}_scales", linear.dtype, [*blocks, linear.outputs], iter([scales]))


def write_table(graph: Graph, gather: gs.Node, values: Values) -> None:
    """Rounds each row of a table with a scale of its own."""
    table = gather.inputs[0]
    dtype, shape = onnx_type(table), [int(size) for size in table.shape]
    data, scales = [], []
    for _, rows in slabs(graph, table):
        q, scale = quantise(rows, values, shape[1], dtype)
        data.append(packed(q.T, values).numpy())
        scales.append(to_bytes(scale[:, 0], dtype))
    q = add_weight(graph, f"{table.name}_q", values.dtype, shape, iter(data))
    stored = add_weight(graph, f"{table.name}_scales", dtype, shape[:1], iter(scales))
    rows = graph.new("DequantizeLinear", [q, stored], {"axis": 0}, f"{gather.name}/table", dtype, shape)
    graph.replace(gather.outputs[0], "Gather", [rows, gather.inputs[1]], dict(gather.attrs), name=gather.name)


def write_rounding(graph: Graph, x: gs.Tensor, values: Values, largest: float, name: str) -> gs.Variable:
    """x rounded to the type and back, with the one scale that numbers of at most `largest` ask for."""
    scale, zero = activation_scale(graph, values, largest, onnx_type(x), name)
    q = graph.new("QuantizeLinear", [x, scale, zero], name=f"{name}/quantise", dtype=values.dtype, shape=x.shape)
    return graph.new("DequantizeLinear", [q, scale, zero], name=f"{name}/dequantise", dtype=onnx_type(x), shape=x.shape)


def activation_scale(graph: Graph, values: Values, largest: float, dtype: int, name: str) -> tuple[gs.Constant, gs.Constant]:
    """A scalar scale of the float type `dtype`, and the zero point that tells QuantizeLinear its type."""
    scale = scales_of(torch.tensor(float(largest)), values, dtype)
    zero = TensorProto(name=graph.unique(f"{name}/zero"), data_type=values.dtype, raw_data=b"\0")
    return graph.number(scale.item(), dtype, f"{name}/scale"), gs.Constant(zero.name, LazyValues(zero))


def scaled_vector(graph: Graph, vector: gs.Constant, scales: torch.Tensor | None) -> gs.Constant:
    """A norm's weight or a bias, times `scales`, in its own type."""
    if scales is None:
        return vector
    dtype = onnx_type(vector)
    values = from_numpy(read_array(graph, vector, dtype)) * scales
    return add_weight(graph, f"{vector.name}_balanced", dtype, [len(values)], iter([to_bytes(values, dtype)]))


def block_for(linear: Linear, form: Format, group_size: int) -> int:
    """How many weights share a scale: the largest block, at most `group_size`, that divides the inputs, or all of them.
    Raises NoMatch where there is none, or no room for it."""
    whole = form.values.bits == 8 or linear.outputs % 2 == 0
    need(whole, f"{linear.outputs} outputs are not a whole number of bytes of 4-bit values")
    if not form.blocks:
        return linear.features
    fitting = [block for block in BLOCKS if block <= group_size and linear.features % block == 0]
    need(fitting, f"{linear.features} input features are not a whole number of blocks of {BLOCKS[0]}")
    return fitting[-1]


def has_room(linear: Linear, form: Format, group_size: int) -> bool:
    try:
        return block_for(linear, form, group_size) > 0
    except NoMatch:
        return False


def _rounded(graph: Graph, linear: Linear, values: Values, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of q [in, out] and of its scales [in / block, out]. What is held is the small weight and one slab."""
    data = torch.empty(linear.features, linear.outputs * values.bits // 8, dtype=torch.uint8)
    scales = torch.empty(linear.features // block, linear.outputs)
    for start, rows in balanced_slabs(graph, linear):
        if linear.feedback is None:
            q, scale = quantise(rows, values, block, linear.dtype)
        else:
            scale = block_scales(rows, values, block, linear.dtype, linear.feedback.importance)
            q = linear.feedback.rounded(rows, scale, values)
        data[:, start * values.bits // 8 : (start + len(rows)) * values.bits // 8] = packed(q, values)
        scales[:, start : start + len(rows)] = scale.T
    return data.numpy(), to_bytes(scales, linear.dtype)
