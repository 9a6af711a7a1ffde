"""Shape arithmetic in one form: each axis is read by one Shape of the input that has it, and known axes are constants.

    Gather(Shape(x), i)              →  Squeeze(Shape(x, i : i+1))
    Slice(Shape(x), a, b)            →  Shape(x, a : b)
    Shape(x, i : i+1), axis known    →  its size
    Shape(x, i : i+1), x computed    →  the same axis of the token input, or of the first input that has it

After it, whatever still reads the past length does so from a cache input, where the static cache can see it.
"""

import numpy as np
import onnx_graphsurgeon as gs

from surgery.graph import Graph, producer, rank


def run(graph: Graph) -> int:
    matches = graph.match(_gather, graph.nodes("Gather")) + graph.match(_slice, graph.nodes("Slice"))
    return matches + graph.match(_read_from_input, graph.nodes("Shape"))


def _gather(graph: Graph, gather: gs.Node) -> bool:
    found = _shape_of(gather.inputs[0])
    index = graph.constant(gather.inputs[1])
    if found is None or index is None or index.size != 1 or gather.attrs.get("axis", 0) != 0:
        return False
    x, start, end = found
    axis = start + index.item() if index.item() >= 0 else end + index.item()
    size = graph.new("Shape", [x], {"start": axis, "end": axis + 1}, dtype=np.int64, shape=[1])
    if index.ndim == 0:
        graph.replace(gather.outputs[0], "Squeeze", [size, graph.int64([0])])
    else:
        graph.redirect(gather.outputs[0], size)
    return True


def _slice(graph: Graph, node: gs.Node) -> bool:
    found = _shape_of(node.inputs[0])
    bounds = [graph.scalar(tensor) for tensor in node.inputs[1:3]]
    step = graph.scalar(node.inputs[4]) if len(node.inputs) > 4 else 1
    if found is None or None in bounds or step != 1:
        return False
    x, start, end = found
    low, high, _ = slice(*bounds).indices(end - start)
    attrs = {"start": start + low, "end": start + high}
    graph.replace(node.outputs[0], "Shape", [x], attrs)
    return True


def _read_from_input(graph: Graph, node: gs.Node) -> bool:
    x, start, end = _shape_of(node.outputs[0]) or (None, 0, 0)
    if x is None or end - start != 1 or x.shape is None:
        return False
    size, result = x.shape[start], node.outputs[0]
    if isinstance(size, int | np.integer):
        graph.redirect(result, graph.int64([int(size)]))
        return True
    tokens = graph.input(graph.signature.tokens)
    for source in [tokens, *graph.gs.inputs]:
        axis = next((axis for axis, other in enumerate(source.shape or []) if other == size), None)
        if axis is not None and not str(size).startswith("unk__"):
            if source is x and axis == start:
                return False
            graph.replace(result, "Shape", [source], {"start": axis, "end": axis + 1})
            return True
    return False


def _shape_of(tensor: gs.Tensor) -> tuple[gs.Tensor, int, int] | None:
    """x, start and end, if `tensor` is Shape(x) of these axes and x's rank is known."""
    node = producer(tensor, "Shape")
    if node is None or (dims := rank(node.inputs[0])) is None:
        return None
    start, end, _ = slice(node.attrs.get("start", 0), node.attrs.get("end")).indices(dims)
    return node.inputs[0], start, end
