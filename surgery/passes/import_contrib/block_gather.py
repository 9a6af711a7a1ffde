"""An embedding of 4 or 8 bits becomes rows of a dequantised table.

GatherBlockQuantized(B, ids, scales, zero_points)  →  Gather(DequantizeLinear(W, scales), ids)

W = B - 8, int4 [rows, features], or B - 128, int8. With zero points off the middle W = B - zero_points in int8, which
holds every difference of two 4-bit numbers: TensorRT takes no zero points. It also rejects a DequantizeLinear after the
Gather.
"""

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, input_of, inputs_of, need, onnx_type, producer
from suture.surgery.graph.weights import SLAB, add_weight, nibbles, read_bytes
from suture.surgery.passes.import_contrib.nbits_matmul import SIGNED
from suture.surgery.passes.import_contrib.nodes import contrib_nodes

UNSIGNED = {TensorProto.UINT8, TensorProto.UINT4}


def run(graph: Graph) -> int:
    return graph.match(_dequantise, contrib_nodes(graph, "GatherBlockQuantized"))


def _dequantise(graph: Graph, node: gs.Node) -> bool:
    table, tokens, scales = inputs_of(node, "data", "indices", "scales")
    need(scales is not None, "it has no scales")
    while (reshape := producer(table, "Reshape")) is not None:  # of the head's weight, which has the same rows
        table = reshape.inputs[0]
    need(isinstance(table, gs.Constant) and isinstance(scales, gs.Constant), "its table is computed")
    block = node.attrs.get("block_size", 128)
    bits = node.attrs.get("bits", 4) if onnx_type(table) == TensorProto.UINT8 else 4
    need(onnx_type(table) in (*UNSIGNED, TensorProto.INT4) and bits in SIGNED, "its values are not integers of 4 or 8 bits")
    need(len(scales.shape) == 2, f"its table has {len(scales.shape)} dimensions")
    need(node.attrs.get("gather_axis", 0) % 2 == 0, "it gathers columns")
    need(node.attrs.get("quantize_axis", 1) % 2 == 1, "its blocks do not lie within rows")
    rows, blocks = (int(size) for size in scales.shape)
    packed = read_bytes(graph, table)
    need(packed.size * 8 == rows * blocks * block * bits, "rows are not a whole number of blocks")
    packed = packed.reshape(rows, -1)
    zero_points = _zero_points(graph, input_of(node, "zero_points"), onnx_type(table), rows, blocks, bits)
    if zero_points is None:
        top_bits = 0x88 if bits == 4 else 0x80
        dtype, slabs = SIGNED[bits], _flipped(packed, 0 if onnx_type(table) == TensorProto.INT4 else top_bits)
    else:
        need(bits == 4 and onnx_type(table) in UNSIGNED, "zero points off the middle of its values")
        dtype, slabs = TensorProto.INT8, _shifted(packed, zero_points, block)
    shape = [rows, blocks * block]
    values = add_weight(graph, f"{table.name}_rows", dtype, shape, slabs)
    attrs = {"axis": 1, "block_size": block}
    dequantised = graph.new("DequantizeLinear", [values, scales], attrs, f"{node.name}/table", onnx_type(scales), shape)
    graph.replace(node.outputs[0], "Gather", [dequantised, tokens], {"axis": 0})
    return True


def _zero_points(graph: Graph, tensor: gs.Tensor | None, dtype: int, rows: int, blocks: int, bits: int) -> np.ndarray | None:
    """uint8 [rows, blocks]; None where each is the middle that making the values signed takes away."""
    if tensor is None:
        need(dtype != TensorProto.UINT4, "unsigned values without zero points")
        return None
    need(isinstance(tensor, gs.Constant), "its zero points are computed")
    packed = read_bytes(graph, tensor)
    values = (nibbles(packed) if bits == 4 else packed).reshape(rows, -1)[:, :blocks]
    middle = 0 if dtype == TensorProto.INT4 else 1 << (bits - 1)
    return None if np.all(values == middle) else values


def _flipped(packed: np.ndarray, top_bits: int) -> Iterator[np.ndarray]:
    step = max(SLAB // packed.shape[1], 1)
    for start in range(0, len(packed), step):
        yield packed[start : start + step] ^ np.uint8(top_bits)


def _shifted(packed: np.ndarray, zero_points: np.ndarray, block: int) -> Iterator[np.ndarray]:
    """int8 slabs of 4-bit values less their block's zero point."""
    step = max(SLAB // packed.shape[1] // 2, 1)
    for start in range(0, len(packed), step):
        values = nibbles(packed[start : start + step]).astype(np.int8)
        yield values - np.repeat(zero_points[start : start + step], block, axis=1).astype(np.int8)
