"""A product with a weight of 4 or 8 bits becomes a product with a dequantised weight.

    MatMulNBits(x, B, scales)               →  x @ DequantizeLinear(W, scales)
    MatMulNBits(x, B, scales, zero_points)  →  the same + sums of x over each block @ ((8 - zero_points) * scales)

W = B - 8, int4 [in, out], or B - 128, int8. B is unsigned, [out, blocks, bytes of a block]. Its values are made signed, by
flipping their top bits, and transposed: in this form onnxruntime fuses the pair back into one product, and TensorRT reads
int4 in the product's own kernel. TensorRT takes no zero points. A zero point in the middle of the range vanishes in W;
another is a shift of a whole block, which what x sums to over the block accounts for exactly. Nor does it take negative
scales beside int8: such a block holds ~W and |scale| instead, and as W = -(~W) - 1, it shifts by |scale|.
accuracy_level, which lets onnxruntime round x to 8 bits, goes.
"""

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, inputs_of, need, onnx_type, rank
from suture.surgery.graph.weights import SLAB, add_weight, nibbles, packed_nibbles, read_array, read_bytes, transposed
from suture.surgery.passes.import_contrib.nodes import contrib_nodes, refuse_inputs
from suture.surgery.passes.portable.linear import rows_by

SIGNED = {4: TensorProto.INT4, 8: TensorProto.INT8}


def run(graph: Graph) -> int:
    made: dict[tuple, tuple] = {}
    return graph.match(lambda graph, node: _dequantise(graph, node, made), contrib_nodes(graph, "MatMulNBits"))


def _dequantise(graph: Graph, node: gs.Node, made: dict[tuple, tuple]) -> bool:
    bits, block, features, outputs = (node.attrs.get(key, 4) for key in ("bits", "block_size", "K", "N"))
    need(bits in SIGNED, f"weights of {bits} bits have no standard type that runs")
    need(features % block == 0, f"{features} input features are not a whole number of blocks of {block}")
    need(not node.attrs.get("weight_prepacked", 0), "the weight is packed for one kind of GPU")
    refuse_inputs(node, "g_idx")
    x, weight, scales, zero_points, bias = inputs_of(node, "A", "B", "scales", "zero_points", "bias")
    need(isinstance(weight, gs.Constant) and isinstance(scales, gs.Constant), "its weight is computed")
    need(onnx_type(scales) == onnx_type(x), "x and scales differ in type")
    key = (id(weight), id(scales), id(zero_points))
    if key not in made:
        made[key] = _repacked(graph, weight, scales, zero_points, bits, block, features, outputs)
    values, turned_scales, shift = made[key]
    attrs, shape = {"axis": 0, "block_size": block}, [features, outputs]
    dequantised = graph.new("DequantizeLinear", [values, turned_scales], attrs, f"{node.name}/weight", onnx_type(scales), shape)
    write_product(graph, node.outputs[0], x, dequantised, shift, bias, node.name)
    return True


def write_product(
    graph: Graph, result: gs.Variable, x: gs.Tensor, weight: gs.Tensor, shift: gs.Constant | None, bias: gs.Tensor | None,
    name: str,
) -> None:  # fmt: skip
    """result = x @ weight [in, out] + (sums of x over each block) @ shift [blocks, out] + bias."""
    addends = [] if bias is None else [bias]
    rows, shape = x, result.shape
    if shift is not None:
        features, outputs = (int(size) for size in weight.shape)
        blocks = int(shift.shape[0])
        rows = graph.new("Reshape", [x, graph.int64([-1, features])], name=f"{name}/rows", shape=["tokens", features])
        apart = [graph.int64([-1, blocks, features // blocks])]
        apart = graph.new("Reshape", [rows, *apart], name=f"{name}/blocks", shape=["tokens", blocks, features // blocks])
        sums = graph.new("ReduceSum", [apart, graph.int64([-1])], {"keepdims": 0}, f"{name}/sums", shape=["tokens", blocks])
        shape = ["tokens", outputs]
        addends.insert(0, graph.new("MatMul", [sums, shift], name=f"{name}/shift", shape=shape))
    steps = [("MatMul", [rows, weight])] + [("Add", [addend]) for addend in addends]
    if shift is not None and rank(x) != 2:
        steps.append(("Reshape", [rows_by(graph, x, outputs)]))
    total: list[gs.Tensor] = []
    for op, inputs in steps[:-1]:
        total = [graph.new(op, [*total, *inputs], name=name if op == "MatMul" else f"{name}/{op.lower()}", shape=shape)]
    graph.replace(result, steps[-1][0], [*total, *steps[-1][1]], name=name if len(steps) == 1 else f"{name}/last")


def _repacked(
    graph: Graph, weight: gs.Constant, scales: gs.Constant, zero_points: gs.Constant | None,
    bits: int, block: int, features: int, outputs: int,
) -> tuple[gs.Constant, gs.Constant, gs.Constant | None]:  # fmt: skip
    """W [in, out], its scales [blocks, out], and the shift [blocks, out] where one is needed."""
    blocks, dtype, middle = features // block, onnx_type(scales), 1 << (bits - 1)
    rows = read_bytes(graph, weight).reshape(outputs, features * bits // 8)
    by_output = read_array(graph, scales, dtype).reshape(outputs, blocks)
    points = None if zero_points is None else _zero_points(graph, zero_points, outputs, blocks, bits)
    shift = None if points is None or np.all(points == middle) else (middle - points) * by_output.astype(np.float32)
    negative = by_output < 0 if bits == 8 else np.zeros(1, bool)
    if negative.any():
        by_output = np.abs(by_output)
        shift = np.where(negative, by_output.astype(np.float32), 0) + (0 if shift is None else shift)
    slabs = _signed_bytes(rows, block, negative) if bits == 8 else _signed_nibbles(rows)
    values = add_weight(graph, f"{weight.name}_signed", SIGNED[bits], [features, outputs], slabs)
    turned = add_weight(graph, f"{scales.name}_transposed", dtype, [blocks, outputs], transposed(by_output))
    if shift is not None:
        shift = transposed(shift.astype(by_output.dtype))
        shift = add_weight(graph, f"{scales.name}_shift", dtype, [blocks, outputs], shift)
    return values, turned, shift


def _signed_nibbles(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Unsigned 4-bit values, uint8 [out, in / 2], as slabs of signed ones, [in, out]."""
    step = max(SLAB // len(rows) // 2, 1)
    for start in range(0, rows.shape[1], step):
        yield packed_nibbles(np.ascontiguousarray(nibbles(rows[:, start : start + step]).T)) ^ 0x88


def _signed_bytes(rows: np.ndarray, block: int, negative: np.ndarray) -> Iterator[np.ndarray]:
    """uint8 [out, in] as slabs of signed values, [in, out]; of blocks that are `negative`, [out, blocks], the complement."""
    step = block * max(SLAB // len(rows) // block, 1)
    for start in range(0, rows.shape[1], step):
        slab = rows[:, start : start + step] ^ 0x80
        if negative.any():
            slab ^= np.repeat(negative[:, start // block : (start + step) // block], block, axis=1) * np.uint8(0xFF)
        yield np.ascontiguousarray(slab.T)


def _zero_points(graph: Graph, zero_points: gs.Tensor, outputs: int, blocks: int, bits: int) -> np.ndarray:
    """float32 [out, blocks]."""
    need(isinstance(zero_points, gs.Constant), "its zero points are computed")
    if onnx_type(zero_points) == TensorProto.UINT8:
        packed = read_bytes(graph, zero_points).reshape(outputs, -1)
        return (nibbles(packed) if bits == 4 else packed)[:, :blocks].astype(np.float32)
    return read_array(graph, zero_points, onnx_type(zero_points)).reshape(outputs, blocks).astype(np.float32)
