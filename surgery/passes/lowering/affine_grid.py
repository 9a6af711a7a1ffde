"""A grid of an affine map becomes a product with its points, a constant.

    AffineGrid(theta, size)     theta: [N, 2, 3] or [N, 3, 4], size: [N, C, H, W] or [N, C, D, H, W], known
        →  Reshape(points [H·W, 3] @ theta^T [N, 3, 2], [N, H, W, 2])

The points are (x, y, 1), from -1 to 1 with align_corners, else at the pixels' centres. They are float32 in half precision, too,
and so is the product, which is rounded once.
"""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, inputs_of, need, onnx_type

FLOAT = TensorProto.FLOAT


def run(graph: Graph) -> int:
    return graph.match(_rewrite, graph.nodes("AffineGrid"))


def _rewrite(graph: Graph, node: gs.Node) -> bool:
    theta, size = inputs_of(node, "theta", "size")
    sizes = graph.constant(size)
    need(sizes is not None, "its size is computed")
    batch, _, *sides = sizes.tolist()
    corners = node.attrs.get("align_corners", 0)
    need(not corners or min(sides) > 1, "a side of one pixel has no two corners to align; runtimes differ there")
    points = _points(sides, corners)
    kind, result = onnx_type(theta), node.outputs[0]
    wide = theta if kind == FLOAT else graph.new("Cast", [theta], {"to": FLOAT}, dtype=FLOAT)
    turned = graph.new("Transpose", [wide], {"perm": [0, 2, 1]}, dtype=FLOAT)
    grid = graph.new("MatMul", [gs.Constant(graph.unique("points"), points), turned], dtype=FLOAT)
    shape = graph.int64([batch, *sides, len(sides)])
    if kind == FLOAT:
        graph.replace(result, "Reshape", [grid, shape], name=node.name)
    else:
        graph.replace(result, "Cast", [graph.new("Reshape", [grid, shape], dtype=FLOAT)], {"to": kind}, name=node.name)
    return True


def _points(sides: list[int], align_corners: int) -> np.ndarray:
    """float32 [points, dimensions + 1], the last axis varying fastest."""
    axes = []
    for side in sides:
        steps = np.arange(side, dtype=np.float64)
        axes.append(steps * 2 / (side - 1) - 1 if align_corners else (2 * steps + 1) / side - 1)
    grid = np.meshgrid(*axes, indexing="ij")[::-1]
    return np.stack([*grid, np.ones_like(grid[0])], -1).reshape(-1, len(sides) + 1).astype(np.float32)
