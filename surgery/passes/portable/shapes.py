"""Shape arithmetic in one form: known sizes are constants, every other size is read by a Shape of the input that has it.

    Gather(Shape(x), i), Slice(Shape(x), ...), Concat(...), Where(Equal(sizes, -1), ones, sizes), ...
        →  a constant, Shape(input, i : j), a sum of two such, its Squeeze, or a Concat of these
    Reshape(x [B, S, 128], [B, S, -1, 32])  →  Reshape(x, [B, S, 4, 32])

After it, whatever still reads the past length does so from a cache input, where the static cache can see it, and every
tensor has the shape that follows, where TorchScript hides it behind comparisons with -1.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, onnx_type, producer, rank
from suture.surgery.graph.files import sort
from suture.surgery.shapes.shape_values import INT64, ShapeValues, mask_covers_past
from suture.surgery.shapes.symbolic_dims import Sum, SymbolicDim

SIZE_OPS = ("Shape", "Gather", "Slice", "Concat", "Where", "Squeeze", "Unsqueeze", "Reshape", "ConstantOfShape", "Expand",
            "Add", "Sub", "Mul", "Div", "Cast")  # fmt: skip


def run(graph: Graph) -> int:
    sort(graph)
    graph.mask_covers_past = mask_covers_past(graph)
    sizes = ShapeValues(graph)
    made: dict[tuple, gs.Tensor] = {}
    return graph.match(lambda graph, node: _visit(graph, node, sizes, made), list(graph.gs.nodes))


def _visit(graph: Graph, node: gs.Node, sizes: ShapeValues, made: dict[tuple, gs.Tensor]) -> bool:
    sizes.learn(node)
    for output in node.outputs:
        _note_shape(graph, output, sizes)
    filled = node.op == "Reshape" and _fill(graph, node, sizes, made)
    return _rewrite(graph, node, sizes, made) or filled


def _note_shape(graph: Graph, tensor: gs.Variable, sizes: ShapeValues) -> None:
    """Writes what is known into the tensor's shape. A size of its own gets a symbol, by which others can have it too."""
    shape = sizes.shapes.get(id(tensor))
    if shape is None:
        return
    declared = tensor.shape if tensor.shape is not None else [None] * len(shape)
    names = [old if (name := sizes.name(new)) is None else name for old, new in zip(declared, shape)]
    vague = [name is None or name == "" or str(name).startswith("unk__") for name in names]
    tensor.shape = [graph.unique("size") if unnamed else name for name, unnamed in zip(names, vague)]


def _reads_capacity(graph: Graph, node: gs.Node) -> bool:
    """Whether this is the number of a static cache's slots, which is written in the caches' shapes alone."""
    shape = producer(node.inputs[0], "Shape") if node.op == "Squeeze" else node
    read = shape is not None and shape.op == "Shape" and graph.signature.static
    return read and shape.inputs[0].name in {cache.past for cache in graph.signature.caches}


def _fill(graph: Graph, reshape: gs.Node, sizes: ShapeValues, made: dict[tuple, gs.Tensor]) -> bool:
    """Puts the number that -1 or 0 stands for into a Reshape's target."""
    target, filled = sizes.symbolic_dims(reshape.inputs[1]), sizes.filled(reshape)
    if target is None:
        return False
    # a size that only some tensor inside has stays a copy: to read it would keep that tensor
    copied = [isinstance(old, int) and old == 0 and _from_inputs(new, sizes) for old, new in zip(target, filled)]
    dims = [new if isinstance(new, int) or copy else old for old, new, copy in zip(target, filled, copied)]
    if dims == target or not all(_readable(dim, sizes) for dim in dims):
        return False
    key = (False, *dims)
    if key not in made:
        made[key] = _write(graph, dims, False, sizes)
    reshape.inputs[1] = made[key]
    return True


def _rewrite(graph: Graph, node: gs.Node, sizes: ShapeValues, made: dict[tuple, gs.Tensor]) -> bool:
    """Puts the one form in place of a node whose dims are known."""
    output = node.outputs[0]
    dims = sizes.values.get(id(output)) if node.op in SIZE_OPS and len(node.outputs) == 1 else None
    if not dims or onnx_type(output) != INT64 or graph.is_output(output) or _reads_capacity(graph, node):
        return False
    if not all(_readable(dim, sizes, but_from=output) for dim in dims):
        return False
    key = (rank(output) == 0, *dims)
    if key not in made and _in_form(node, sizes):
        made[key] = output
    if made.get(key) is output:
        return False
    if key not in made:
        made[key] = _write(graph, dims, rank(output) == 0, sizes)
    graph.redirect(output, made[key])
    return True


def _readable(dim: SymbolicDim, sizes: ShapeValues, but_from: gs.Tensor | None = None) -> bool:
    """Whether it is a number, an axis of a tensor, a sum of inputs' axes, or held by another tensor than `but_from`."""
    if isinstance(dim, int) or (dim.axis is not None and dim.axis.axis >= 0) or _summands(dim, sizes):
        return True
    holder = _holder(dim, sizes)
    return holder is not None and holder[0] is not but_from


def _holder(dim: SymbolicDim, sizes: ShapeValues) -> tuple[gs.Tensor, int] | None:
    if dim in sizes.holders:
        return sizes.holders[dim]
    return None if dim.axis is None else (sizes.tensors[dim.axis.source], dim.axis.index)


def _summands(dim: SymbolicDim, sizes: ShapeValues) -> list[Sum]:
    """The axes of the graph's inputs whose sizes add up to the dim; none where it is something else."""
    if isinstance(dim, int) or len(dim.terms) < 2:
        return []
    terms = [Sum((term,)) for term in dim.terms]
    ends = {id(tensor) for tensor in sizes.graph.gs.inputs}
    known = [term.axis is not None and term.axis.axis >= 0 and id(sizes.tensors[term.axis.source]) in ends for term in terms]
    return terms if all(known) else []


def _from_inputs(dim: SymbolicDim, sizes: ShapeValues) -> bool:
    if isinstance(dim, int) or _summands(dim, sizes):
        return True
    source = None if dim.axis is None else sizes.tensors[dim.axis.source]
    return any(source is tensor for tensor in sizes.graph.gs.inputs)


def _in_form(node: gs.Node, sizes: ShapeValues) -> bool:
    """Whether it is what _write would put in its place."""
    dims = sizes.values.get(id(node.outputs[0]))
    if not dims:
        return False
    if node.op == "Shape":
        x = sizes.numbers.get(id(node.inputs[0]))
        return all(
            not isinstance(e, int) and e.axis is not None and (e.axis.source, e.axis.axis >= 0) == (x, True) for e in dims
        )
    above = [tensor.inputs[0] if tensor.inputs else None for tensor in node.inputs]
    if node.op == "Squeeze":
        held = not isinstance(dims[0], int) and (_holder(dims[0], sizes) or (None,))[0] is node.inputs[0]
        return held or (above[0] is not None and above[0].op in ("Shape", "Add") and _in_form(above[0], sizes))
    if node.op in ("Unsqueeze", "Gather") and len(dims) == 1 and rank(node.outputs[0]) == 1:
        holder = None if isinstance(dims[0], int) else _holder(dims[0], sizes)
        from_there = holder is not None and holder[0] is node.inputs[0]
        return from_there and (node.op == "Unsqueeze" or sizes.symbolic_dims(node.inputs[1]) == [holder[1]])
    if node.op == "Add":
        return all(part is not None and part.op in ("Shape", "Squeeze") and _in_form(part, sizes) for part in above)
    if node.op != "Concat" or len(_runs(dims)) != len(above):
        return False
    computed = [part for part in above if part is not None and part.op in SIZE_OPS and part.op not in ("Unsqueeze", "Gather")]
    return all(part.op in ("Shape", "Add") and _in_form(part, sizes) for part in computed)


def _write(graph: Graph, dims: list[SymbolicDim], scalar: bool, sizes: ShapeValues) -> gs.Tensor:
    if all(isinstance(dim, int) for dim in dims):
        return graph.int64(dims[0] if scalar else list(dims))
    parts = [_part(graph, run, sizes) for run in _runs(dims)]
    if scalar:
        result = graph.new("Squeeze", [parts[0], graph.int64([0])], shape=[])
    elif len(parts) == 1:
        result = parts[0]
    else:
        result = graph.new("Concat", parts, {"axis": 0}, dtype=np.int64, shape=[len(dims)])
    sizes.values[id(result)] = dims
    return result


def _runs(dims: list[SymbolicDim]) -> list[list[SymbolicDim]]:
    """Neighbours that one tensor holds: numbers, and axes of one tensor that follow each other."""
    runs: list[list[SymbolicDim]] = []
    for dim in dims:
        if runs and _follows(runs[-1][-1], dim):
            runs[-1].append(dim)
        else:
            runs.append([dim])
    return runs


def _follows(last: SymbolicDim, dim: SymbolicDim) -> bool:
    if isinstance(last, int) or isinstance(dim, int):
        return isinstance(last, int) and isinstance(dim, int)
    one, other = last.axis, dim.axis
    return None not in (one, other) and one.axis >= 0 and one.source == other.source and other.axis == one.axis + 1


def _part(graph: Graph, dims: list[SymbolicDim], sizes: ShapeValues) -> gs.Tensor:
    if isinstance(dims[0], int):
        return graph.int64(dims)
    axis = dims[0].axis
    if axis is not None and axis.axis >= 0:
        source, attrs = sizes.tensors[axis.source], {"start": axis.axis, "end": axis.axis + len(dims)}
        part = graph.new("Shape", [source], attrs, dtype=np.int64, shape=[len(dims)])
        sizes.values[id(part)] = dims
        return part
    summands = _summands(dims[0], sizes)
    if summands:
        total = _part(graph, summands[:1], sizes)
        for each in summands[1:]:
            total = graph.new("Add", [total, _part(graph, [each], sizes)], dtype=np.int64, shape=[1])
        sizes.values[id(total)] = dims
        return total
    source, index = _holder(dims[0], sizes)
    if rank(source) == 0:
        return graph.new("Unsqueeze", [source, graph.int64([0])], shape=[1])
    if rank(source) == 1 and source.shape[0] == 1:
        return source
    return graph.new("Gather", [source, graph.int64([index])], {"axis": 0}, shape=[1])
