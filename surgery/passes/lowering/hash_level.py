"""A level of a 2-D hash grid is a dense picture that GridSample reads, where it is small.

    Σ_c Gather(T, index(⌊p⌋, c)) · Π_d |1 − o_cd − (p − ⌊p⌋)_d|         p: [N, 2], from 0 to K - 2, c: the four corners around it
        →  GridSample(D [1, F, K, K], 2·p / (K − 1) − 1)                align_corners, D[f, y, x] = T[index((x, y), 0), f]

No spelling is looked for but the last sum. What computes the indices of ⌊p⌋ is run for every cell: each corner's has to be the first
corner's of the cell that the corner lies in, which makes D. What computes the weights of p − ⌊p⌋ is run over all of a cell: each corner's
has to be 1 there, 0 at the others, and bilinear between. p must be proven to be bounded (suture.surgery.ranges). Where D would have more
than LIMIT cells the hash stays; GridSample finds p again from a number in -1 to 1, by which it errs p · 2^-23 cells.
"""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.core.sessions import new_session
from suture.surgery.graph import Graph, need, onnx_type, op_of, producer, rank, static_dim
from suture.surgery.graph.weights import add_weight, read_array
from suture.surgery.ranges import Ranges

LIMIT = 1 << 16  # cells
FLOAT = TensorProto.FLOAT
STEPS = 33  # of a cell, along each side, at which its weights are looked at
CORNERS = 4
POINTWISE = ("Unsqueeze", "Squeeze", "Slice", "Gather", "Add", "Sub", "Mul", "Mod", "Div", "Cast", "Abs", "Where", "ReduceProd", "Concat",
             "BitwiseAnd", "BitwiseXor", "BitwiseOr", "Identity", "Transpose", "Neg")  # fmt: skip


def run(graph: Graph) -> int:
    ranges = Ranges(graph)
    return graph.match(lambda graph, node: _rewrite(graph, node, ranges), graph.nodes("ReduceSum"))


def _rewrite(graph: Graph, total: gs.Node, ranges: Ranges) -> bool:
    product = producer(total.inputs[0], "Mul")
    if product is None or graph.scalar(total.inputs[1] if len(total.inputs) > 1 else None) != 1:
        return False
    sides = [(_gathered(one), one, other) for one, other in (product.inputs, product.inputs[::-1])]
    found = next((each for each in sides if each[0] is not None), None)
    if found is None:
        return False
    gather, _, weights = found
    table, index = gather.inputs[0], gather.inputs[1]
    cells = _start(graph, index, "Floor")
    parts = _start(graph, weights, "Sub")
    if cells is None or parts is None:
        return False
    p = cells.inputs[0].inputs[0]
    need(
        parts.inputs[0].inputs[0] is p and parts.inputs[0].inputs[1] is cells,
        "its weights are of another place than its indices",
    )
    need(rank(p) == 2 and static_dim(p, 1) == 2, "its place is not two numbers a row")
    need(not total.attrs.get("keepdims", 1) and onnx_type(total.outputs[0]) == FLOAT, "its sum is not of float32")
    bound = ranges.of(cells)
    need(bound is not None and bound[0] >= 0, "its place is not known to be bounded and not negative")
    side = int(bound[1]) + 2
    need(side * side <= LIMIT, f"{side} x {side} cells are more than a picture of at most {LIMIT:,} is made for")
    rows = _table(graph, table)
    need(rows is not None, "its table is computed")
    dense = _dense(graph, cells, index, parts, weights, side)
    need(dense.min() >= -len(rows) and dense.max() < len(rows), "an index lies outside its table")
    picture = np.ascontiguousarray(np.asarray(rows[dense], np.float32).transpose(2, 1, 0))[None]  # [1, F, y, x]
    values = add_weight(graph, "hash_level", FLOAT, list(picture.shape), iter([picture]))
    place = graph.new("Mul", [p, graph.number(2 / (side - 1), FLOAT)], dtype=FLOAT)
    place = graph.new("Sub", [place, graph.number(1, FLOAT)], dtype=FLOAT)
    place = graph.new("Unsqueeze", [place, graph.int64([0, 2])], dtype=FLOAT)
    attrs = {"mode": "linear", "padding_mode": "border", "align_corners": 1}
    seen = graph.new("GridSample", [values, place], attrs, dtype=FLOAT)  # [1, F, N, 1]
    seen = graph.new("Squeeze", [seen, graph.int64([0, 3])], dtype=FLOAT)
    graph.replace(total.outputs[0], "Transpose", [seen], {"perm": [1, 0]}, name=total.name)
    return True


def _gathered(tensor: gs.Tensor) -> gs.Node | None:
    """The Gather of rows that a factor is, maybe cast."""
    node = producer(tensor, "Cast", "Gather")
    if node is not None and node.op == "Cast":
        node = producer(node.inputs[0], "Gather")
    return node if node is not None and node.attrs.get("axis", 0) == 0 else None


def _start(graph: Graph, tensor: gs.Tensor, op: str) -> gs.Tensor | None:
    """The one output of a node `op`, of p or p − ⌊p⌋, from which alone and from constants `tensor` is computed point by point."""
    waiting, seen, found = [tensor], set(), []
    while waiting:
        at = waiting.pop()
        if id(at) in seen or isinstance(at, gs.Constant) or at.is_empty():
            continue
        seen.add(id(at))
        node = producer(at)
        if node is None:
            return None
        of_place = op_of(node) == op and (op == "Floor" or producer(node.inputs[1], "Floor") is not None)
        if of_place:
            found.append(at)
        elif op_of(node) in POINTWISE:
            waiting += node.inputs
        else:
            return None
    return found[0] if len(found) == 1 else None


def _dense(graph: Graph, cells: gs.Tensor, index: gs.Tensor, parts: gs.Tensor, weights: gs.Tensor, side: int) -> np.ndarray:
    """int64 [x, y]: each cell's row of the table."""
    steps = np.linspace(0, 1, STEPS, dtype=np.float32)
    places = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    shares = _computed(graph, parts, weights, places).reshape(len(places), -1)
    need(shares.shape[1] == CORNERS, "it has other than four corners")
    offsets = np.array([places[shares[:, corner].argmax()] for corner in range(CORNERS)])
    bilinear = np.prod(np.abs(1 - offsets - places[:, None]), -1)
    need(np.abs(shares - bilinear).max() <= 1e-6, "its weights are not bilinear")
    need(len({tuple(each) for each in offsets}) == CORNERS and np.isin(offsets, (0, 1)).all(), "two corners are the same")
    offsets, length = offsets.astype(int), side + 1
    every = np.stack(np.meshgrid(*[np.arange(length, dtype=np.float32)] * 2, indexing="ij"), -1).reshape(-1, 2)
    found = _computed(graph, cells, index, every).reshape(length, length, CORNERS)
    dense = found[..., int(np.flatnonzero((offsets == 0).all(-1))[0])]
    for corner, (x, y) in enumerate(offsets):
        same = found[: side - 1, : side - 1, corner] == dense[x : x + side - 1, y : y + side - 1]
        need(same.all(), "a corner's index is not that of the cell that it lies in")
    return dense[:side, :side]


def _computed(graph: Graph, start: gs.Tensor, end: gs.Tensor, values: np.ndarray) -> np.ndarray:
    """`end` of float32 `values` in place of `start`, in onnxruntime."""
    given = gs.Variable("given", np.float32, list(values.shape))
    copies, nodes = {id(start): given}, []

    def copied(tensor: gs.Tensor) -> gs.Tensor:
        if isinstance(tensor, gs.Constant) or tensor.is_empty():
            return tensor
        if id(tensor) not in copies:
            node = tensor.inputs[0]
            output = gs.Variable(f"v{len(copies)}", onnx_type(tensor))
            copies[id(tensor)] = output
            nodes.append(
                gs.Node(node.op, f"n{len(copies)}", dict(node.attrs), [copied(each) for each in node.inputs], [output])
            )
        return copies[id(tensor)]

    result = copied(end)
    part = gs.Graph(nodes, [given], [result], import_domains=graph.gs.import_domains)
    model = gs.export_onnx(part.toposort(), do_type_check=False)
    model.ir_version = 10
    return new_session(model).run(None, {"given": values})[0]


def _table(graph: Graph, tensor: gs.Tensor) -> np.ndarray | None:
    """Rows [T, F] of a stored table, or of one that is stored flat; None of one that is computed."""
    node = producer(tensor, "Reshape")
    stored = tensor if node is None else node.inputs[0]
    shape = [-1, static_dim(tensor, 1)] if node is None else graph.constant(node.inputs[1])
    if not isinstance(stored, gs.Constant) or shape is None or len(shape) != 2 or None in list(shape):
        return None
    return read_array(graph, stored, onnx_type(stored)).reshape([int(size) for size in shape])
