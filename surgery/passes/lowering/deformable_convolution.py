"""A deformable convolution becomes a sampling of its input and a product, of which TensorRT has both.

    DeformConv(x, W, offset, b, mask)     x: [N, C, H, W], offset: [N, G·K·2, h, w], mask: [N, G·K, h, w], K = kH·kW
        p    = (i·stride − pad + k·dilation) + offset                    [N·G, K, 2, h, w], in pixels
        s    = GridSample(x [N·G, C/G, H, W], (2p + 1) / (W, H) − 1)     [N·G, C/G, K·h, w], zeros outside, align_corners=0
        →      Conv(s · mask  [N, C·K, h, w], W [M, C/group · K, 1, 1], b, group)

Of the offsets the first of two is down, the second to the right; sampling takes the other order. Places and samples are float32 in
half precision, too: a float16 place beyond the 32nd pixel is off by a hundredth of a pixel or more. The sizes must be known.
"""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, inputs_of, need, onnx_type, rank, static_dim

FLOAT = TensorProto.FLOAT


def run(graph: Graph) -> int:
    return graph.match(_rewrite, graph.nodes("DeformConv"))


def _rewrite(graph: Graph, node: gs.Node) -> bool:
    x, weight, offset, bias, mask = inputs_of(node, "X", "W", "offset", "B", "mask")
    need(rank(x) == 4 and rank(weight) == 4 and rank(offset) == 4, "it is not of two dimensions, or its rank is not known")
    sizes = [static_dim(x, axis) for axis in (1, 2, 3)] + [static_dim(weight, axis) for axis in range(4)]
    places = static_dim(offset, 2), static_dim(offset, 3)
    need(None not in (*sizes, *places), "its sizes are not known")
    channels, height, width, made, _, *kernel = sizes
    groups, taps = node.attrs.get("offset_group", 1), kernel[0] * kernel[1]
    kind = onnx_type(x)
    points = _points(graph, node, offset, groups, kernel, places, (height, width))
    pixels = graph.new("Reshape", [_cast(graph, x, FLOAT), graph.int64([-1, channels // groups, height, width])], dtype=FLOAT)
    attrs = {"mode": "linear", "padding_mode": "zeros", "align_corners": 0}
    seen = graph.new("GridSample", [pixels, points], attrs, dtype=FLOAT)
    if mask is not None:
        shares = graph.new(
            "Reshape", [_cast(graph, mask, FLOAT), graph.int64([-1, 1, taps * places[0], places[1]])], dtype=FLOAT
        )
        seen = graph.new("Mul", [seen, shares], dtype=FLOAT)
    seen = graph.new("Reshape", [_cast(graph, seen, kind), graph.int64([-1, channels * taps, *places])], dtype=kind)
    group = node.attrs.get("group", 1)
    flat = graph.new("Reshape", [weight, graph.int64([made, channels // group * taps, 1, 1])], dtype=kind)
    flat.shape = [made, channels // group * taps, 1, 1]
    inputs = [seen, flat] if bias is None else [seen, flat, bias]
    graph.replace(node.outputs[0], "Conv", inputs, {"group": group, "kernel_shape": [1, 1]}, name=node.name)
    return True


def _points(
    graph: Graph,
    node: gs.Node,
    offset: gs.Tensor,
    groups: int,
    kernel: list[int],
    places: tuple[int, int],
    sides: tuple[int, int],
) -> gs.Tensor:
    """float32 [N·G, K·h, w, 2]: where in the input each tap lies, (x, y) from -1 to 1."""
    attrs, taps = node.attrs, kernel[0] * kernel[1]
    pads, strides, dilations = attrs.get("pads", [0] * 4), attrs.get("strides", [1, 1]), attrs.get("dilations", [1, 1])
    scales = 2 / np.array(sides, np.float32)
    base = np.zeros([2, taps, 2, *places], np.float32)  # each of the two alone varies along one side only
    tap = np.indices(kernel).reshape(2, taps)
    for side in (0, 1):
        shape = [1, places[0], 1] if side == 0 else [1, 1, places[1]]
        pixel = (
            np.arange(places[side]).reshape(shape) * strides[side]
            - pads[side]
            + tap[side].reshape(taps, 1, 1) * dilations[side]
        )
        base[side, :, side] = (2 * pixel + 1) / sides[side] - 1
    moved = graph.new("Reshape", [_cast(graph, offset, FLOAT), graph.int64([-1, taps, 2, *places])], dtype=FLOAT)
    moved = graph.new("Mul", [moved, _constant(graph, scales.reshape(2, 1, 1))], dtype=FLOAT)
    for part in (base[0, :, :, :, :1], base[1, :, :, :1, :]):
        moved = graph.new("Add", [moved, _constant(graph, part)], dtype=FLOAT)
    turned = graph.new("Gather", [moved, graph.int64([1, 0])], {"axis": 2}, dtype=FLOAT)
    turned = graph.new("Transpose", [turned], {"perm": [0, 1, 3, 4, 2]}, dtype=FLOAT)
    return graph.new("Reshape", [turned, graph.int64([-1, taps * places[0], places[1], 2])], dtype=FLOAT)


def _constant(graph: Graph, values: np.ndarray) -> gs.Constant:
    return gs.Constant(graph.unique("places"), np.ascontiguousarray(values, np.float32))


def _cast(graph: Graph, tensor: gs.Tensor, kind: int) -> gs.Tensor:
    return tensor if onnx_type(tensor) == kind else graph.new("Cast", [tensor], {"to": kind}, dtype=kind)
