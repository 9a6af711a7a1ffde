"""Unsigned 4-bit weights become signed ones, the only kind that TensorRT takes.

    DequantizeLinear(W, scales, zero_points = 8)     →  DequantizeLinear(W - 8, scales)
    x @ DequantizeLinear(W, scales, zero_points)     →  x @ DequantizeLinear(W - 8, scales)
                                                        + sums of x over each block @ ((8 - zero_points) * scales)

The second, as in nbits_matmul, where blocks lie along the rows of W [in, out] and nothing but products reads it.
"""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, inputs_of, need, onnx_type, op_of, rank
from suture.surgery.graph.weights import SLAB, add_weight, nibbles, read_array, read_bytes
from suture.surgery.passes.import_contrib.nbits_matmul import write_product

MIDDLE = 8
TOP_BITS = 0x88


def run(graph: Graph) -> int:
    made: dict[int, gs.Constant] = {}
    candidates = [node for node in graph.nodes("DequantizeLinear") if onnx_type(node.inputs[0]) == TensorProto.UINT4]
    return graph.match(lambda graph, node: _signed(graph, node, made), candidates)


def _signed(graph: Graph, node: gs.Node, made: dict[int, gs.Constant]) -> bool:
    weight, scales, zero_points = inputs_of(node, "x", "x_scale", "x_zero_point")
    dequantised = node.outputs[0]
    if not isinstance(weight, gs.Constant):
        return False
    need(isinstance(zero_points, gs.Constant), "unsigned values without constant zero points")
    points = nibbles(read_bytes(graph, zero_points))[: int(np.prod(zero_points.shape, dtype=np.int64))]
    shift = None
    if not np.all(points == MIDDLE):
        axis = node.attrs.get("axis", 1)
        need(axis in (0, -2) and rank(weight) == 2, f"zero points other than 8, in blocks along axis {axis}")
        products = list(dequantised.outputs)
        as_weight = [op_of(each) == "MatMul" and each.inputs[1] is dequantised for each in products]
        need(all(as_weight) and not graph.is_output(dequantised), "zero points other than 8 outside a product")
        need(isinstance(scales, gs.Constant), "its scales are computed")
        values = read_array(graph, scales, onnx_type(scales))
        off = (MIDDLE - points.reshape(values.shape).astype(np.float32)) * values.astype(np.float32)
        shape = [int(size) for size in scales.shape]
        shift = add_weight(graph, f"{scales.name}_shift", onnx_type(scales), shape, iter([off.astype(values.dtype)]))
    if id(weight) not in made:
        packed = read_bytes(graph, weight)
        slabs = (packed[start : start + SLAB] ^ np.uint8(TOP_BITS) for start in range(0, len(packed), SLAB))
        shape = [int(size) for size in weight.shape]
        made[id(weight)] = add_weight(graph, f"{weight.name}_signed", TensorProto.INT4, shape, slabs)
    graph.replace(dequantised, "DequantizeLinear", [made[id(weight)], scales], dict(node.attrs))
    if shift is not None:
        dequantised.shape = [int(size) for size in weight.shape]
        for product in products:
            write_product(graph, product.outputs[0], product.inputs[0], dequantised, shift, None, product.name)
    return True
