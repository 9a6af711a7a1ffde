"""A weighted sum over points of several levels, as deformable attention takes it, is one of each level and their sum.

    ReduceSum(Reshape(Stack_l(GridSample_l [N, D, Q, P]), [N, D, Q, L·P]) · w [N, 1, Q, L·P], -1)
        →  Σ_l ReduceSum(GridSample_l · w[..., l·P : (l + 1)·P], -1)                       of Concat on the last axis, too

Half precision may be cast between the product and the sum. The samples are then summed where they are made, and never stacked:
TensorRT takes two kernels in place of four for three levels, and moves a third of the bytes. So mmcv's function, transformers'
Deformable DETR and RT-DETR have it.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, operands, producer, rank, static_dim

RANK = 4  # of samples


def run(graph: Graph) -> int:
    return graph.match(_rewrite, graph.nodes("ReduceSum"))


def _rewrite(graph: Graph, total: gs.Node) -> bool:
    product = producer(total.inputs[0], "Mul", "Cast")
    wide = product if product is not None and product.op == "Cast" else None  # torch sums half precision in float32
    product = product if wide is None else producer(wide.inputs[0], "Mul")
    if product is None or len(total.inputs) < 2:
        return False
    found = next(((_levels(graph, one), other) for one, other in operands(product) if _levels(graph, one)), None)
    if found is None:
        return False
    levels, weights = found
    axes = graph.constant(total.inputs[1])
    need(axes is not None and axes.tolist() in ([-1], [RANK - 1]), "it sums over other than the last axis")
    points = [static_dim(level, -1) for level in levels]
    need(rank(weights) == RANK and static_dim(weights, -1) == sum(points), "its weights are not one a point")
    attrs = {"keepdims": total.attrs.get("keepdims", 1)}
    place, terms = 0, []
    for level, count in zip(levels, points):
        ends = [graph.int64([end]) for end in (place, place + count, RANK - 1)]
        share = graph.new("Slice", [weights, *ends], shape=[*weights.shape[:-1], count])
        term = graph.new("Mul", [level, share], shape=level.shape)
        if wide is not None:
            term = graph.new("Cast", [term], dict(wide.attrs), dtype=wide.attrs["to"], shape=level.shape)
        terms.append(graph.new("ReduceSum", [term, graph.int64([RANK - 1])], attrs))
        place += count
    *first, last = terms
    summed = first[0]
    for term in first[1:]:
        summed = graph.new("Add", [summed, term])
    graph.replace(total.outputs[0], "Add", [summed, last], name=total.name)
    return True


def _levels(graph: Graph, tensor: gs.Tensor) -> list[gs.Tensor] | None:
    """The samples of two or more levels that a tensor of samples has one after the other on its last axis."""
    node = producer(tensor, "Concat", "Reshape")
    if node is None:
        return None
    if node.op == "Concat":
        parts = list(node.inputs) if node.attrs["axis"] in (-1, RANK - 1) else []
        return parts if _samples(parts) else None
    stack = producer(node.inputs[0], "Concat")
    if stack is None or stack.attrs["axis"] not in (-2, RANK - 1):
        return None
    parts = [_before(graph, part) for part in stack.inputs]
    if any(part is None for part in parts) or not _samples(parts):
        return None
    sizes = [static_dim(parts[0], axis) for axis in (1, 2, 3)]
    same = all([static_dim(part, axis) for axis in (1, 2, 3)] == sizes for part in parts)
    want = [*sizes[:2], sizes[2] * len(parts)] if None not in sizes else None
    kept = rank(tensor) == RANK and [static_dim(tensor, axis) for axis in (1, 2, 3)] == want
    need(same and kept, "its stacked levels are not known to be flattened into points alone")
    return parts


def _before(graph: Graph, part: gs.Tensor) -> gs.Tensor | None:
    """What gets an axis of levels before its last."""
    node = producer(part, "Unsqueeze")
    axes = graph.constant(node.inputs[1]) if node is not None else None
    return node.inputs[0] if axes is not None and axes.tolist() in ([-2], [RANK - 1]) else None


def _samples(parts: list[gs.Tensor]) -> bool:
    return len(parts) > 1 and all(
        producer(part, "GridSample") is not None and rank(part) == RANK and static_dim(part, -1) is not None for part in parts
    )
