"""Which tensors [..., rows, D] have a row for each token of the step, and not because a number or a name is the same.

Shapes are inferred for steps of two lengths, at made-up sizes that nothing else in a graph has: rows that are as many as the
tokens each time come from the tokens. What onnx's inference cannot follow is looked up among the sizes that follow from the
inputs' own.
"""

from collections.abc import Iterable, Sequence

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, static_dim
from suture.surgery.graph.files import infer_shapes, inner_model, sort
from suture.surgery.shapes.shape_values import ShapeValues

STEPS = ((2, 1013, 1511), (3, 1019, 1523))  # batch, tokens, past


def of_tokens(graph: Graph, tensors: Iterable[gs.Tensor]) -> set[int]:
    """The ids of those tensors whose last axis but one is the tokens'; of none where the graph takes no tokens."""
    tensors = list(tensors)
    if graph.signature.tokens is None or not tensors:
        return set()
    tokens = graph.input(graph.signature.tokens)
    fixed = static_dim(tokens, 1)
    sort(graph)
    sizes = ShapeValues(graph)
    for node in graph.gs.nodes:
        sizes.learn(node)
    wanted = sizes.axis(tokens, 1) if fixed is None else fixed
    found = {id(tensor) for tensor in tensors if _rows(sizes.shape(tensor)) == wanted}
    if len(found) < len({id(tensor) for tensor in tensors}):
        inferred = [_lengths(graph, *step) for step in STEPS]
        for tensor in tensors:
            if all(rows.get(tensor.name) == (fixed or step[1]) for rows, step in zip(inferred, STEPS)):
                found.add(id(tensor))
    return found


def same_length(graph: Graph, first: tuple[gs.Tensor, int], second: tuple[gs.Tensor, int]) -> bool:
    """Whether two axes, each of a tensor, are as long as each other: both a number, or one computed from the other."""
    fixed = [static_dim(*each) for each in (first, second)]
    if None not in fixed:
        return fixed[0] == fixed[1]
    sort(graph)
    sizes = ShapeValues(graph)
    for node in graph.gs.nodes:
        sizes.learn(node)
    shapes = [sizes.shape(tensor) for tensor, _ in (first, second)]
    lengths = [None if shape is None else shape[axis] for shape, (_, axis) in zip(shapes, (first, second))]
    return lengths[0] is not None and lengths[0] == lengths[1]


def _lengths(graph: Graph, batch: int, steps: int, past: int) -> dict[str, int]:
    """The last axis but one of every tensor, where it is a number, by the tensor's name."""
    model, signature = inner_model(graph), graph.signature
    model.graph.ClearField("value_info")
    known = {signature.tokens: (0, (batch, steps)), signature.mask: (0, (batch, past + steps))}
    known |= {signature.positions: (-2, (batch, steps))}
    known |= {cache.past: (0, (batch, None, past)) for cache in signature.caches}
    for value in model.graph.input:
        first, lengths = known.get(value.name, (0, ()))
        dims = list(value.type.tensor_type.shape.dim)
        for dim, length in zip(dims[first:] if len(dims) >= -first else [], lengths):
            if length is not None and not dim.HasField("dim_value"):
                dim.dim_value = length
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    shapes = {value.name: value.type.tensor_type.shape.dim for value in infer_shapes(model).graph.value_info}
    return {name: dim.dim_value for name, dims in shapes.items() if (dim := _rows(dims)) and dim.HasField("dim_value")}


def _rows(shape: Sequence | None) -> object:
    return shape[-2] if shape is not None and len(shape) > 1 else None
