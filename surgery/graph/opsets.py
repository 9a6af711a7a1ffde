"""A model of an older opset, written in the operators of opset 24, each with the meaning that it had.

onnx's own converter gives up at the first operator that it knows nothing of, changes the number alone from opset 18 on, and
leaves GroupNormalization's scale and GridSample's modes as they were. Here every operator whose inputs or attributes have
changed since opset 9 has an adapter; of the rest only the types have grown (a test holds both lists against onnx.defs).
"""

from collections.abc import Callable, Iterator

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper, version_converter

from suture.core.errors import UserError
from suture.core.repairable import TYPES_ONLY, since
from suture.core.subgraphs import all_graphs
from suture.core.traits import OPSET, STANDARD

OLDEST = 9
REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
              "ReduceSum", "ReduceSumSquare")  # fmt: skip
SOFTMAXES = ("Softmax", "LogSoftmax", "Hardmax")
# What onnxruntime registers in the standard's domain where the standard has no such operator yet: the meaning is the same.
EARLY = ("LayerNormalization", "SimplifiedLayerNormalization")


class Writer:
    """Writes what takes a node's place, and the constants that this needs, into the node's own graph."""

    def __init__(self, graph: GraphProto, taken: set[str], ranks: dict[str, int]):
        self.graph, self.taken, self.ranks = graph, taken, ranks
        self.before: list[NodeProto] = []  # the node that is being adapted
        self.after: list[NodeProto] = []
        self.weights = {tensor.name: tensor for tensor in graph.initializer}

    def name(self, near: str) -> str:
        name, number = near, 0
        while name in self.taken:
            number += 1
            name = f"{near}_{number}"
        self.taken.add(name)
        return name

    def constant(self, near: str, values: object, dtype: type | np.dtype = np.int64) -> str:
        name = self.name(near)
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def node(self, op: str, inputs: list[str], near: str, **attributes: object) -> str:
        result = self.name(near)
        self.before.append(helper.make_node(op, inputs, [result], self.name(near), **attributes))
        return result


def upgrade(model: ModelProto, where: object, infer: Callable[[ModelProto], ModelProto]) -> ModelProto:
    """The model at opset 24. `infer` infers shapes. Raises UserError naming the operator that cannot be brought there."""
    version = next(entry.version for entry in model.opset_import if entry.domain in STANDARD)
    if version > OPSET:
        raise UserError(where, f"opset {version}", f"export at opset {OPSET} or below")
    if version < OLDEST:
        _refuse_old_scans(model, where)
        try:
            model = version_converter.convert_version(model, OLDEST)
        except Exception as error:  # onnx raises classes of its own
            reason = str(error).strip().splitlines()[-1]
            raise UserError(where, f"opset {version} does not convert to {OLDEST} ({reason})", "export anew") from None
        version = OLDEST
    taken = {name for graph in all_graphs(model.graph) for name in _names(graph)}
    softmaxes = False
    for graph in all_graphs(model.graph):
        softmaxes |= version < 13 and any(node.op_type in SOFTMAXES and node.domain in STANDARD for node in graph.node)
        _adapt(graph, version, Writer(graph, taken, {}), where, late=False)
    for entry in model.opset_import:
        if entry.domain in STANDARD:
            entry.version = OPSET
    if softmaxes:  # they keep shapes, so that ranks can be inferred before they are adapted
        inferred = infer(model)
        ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for graph in all_graphs(inferred.graph)
            for value in (*graph.value_info, *graph.input, *graph.output)
            if value.type.tensor_type.HasField("shape")
        }
        for graph in all_graphs(model.graph):
            ranks |= {tensor.name: len(tensor.dims) for tensor in graph.initializer}
        for graph in all_graphs(model.graph):
            _adapt(graph, version, Writer(graph, taken, ranks), where, late=True)
    return model


def _adapt(graph: GraphProto, version: int, writer: Writer, where: object, late: bool) -> None:
    nodes = []
    for node in graph.node:
        adapters = ADAPTERS.get(node.op_type, ()) if node.domain in STANDARD else ()
        _refuse_unknown(node, version, where)
        if late == (node.op_type in SOFTMAXES):
            for until, adapter in adapters:
                if version < until:
                    problem = adapter(node, writer)
                    if problem:
                        raise UserError(where, f"{node.op_type} {node.name}: {problem}", f"export at opset {until} or later")
        nodes += [*writer.before, node, *writer.after]
        writer.before, writer.after = [], []
    del graph.node[:]
    graph.node.extend(nodes)


def _refuse_unknown(node: NodeProto, version: int, where: object) -> None:
    """An operator of the standard that has changed in a way that nothing here knows, or that there is none of."""
    op = node.op_type
    if node.domain not in STANDARD or op in ADAPTERS or op in TYPES_ONLY or op in EARLY or op.startswith("TRT_"):
        return
    if since(op, version) != since(op, OPSET):
        raise UserError(where, f"{op} of opset {version} is not what it is at opset {OPSET}", f"export at opset {OPSET}")


def _refuse_old_scans(model: ModelProto, where: object) -> None:
    """Before opset 9 a Scan goes over the second axis, for each row of a batch; onnx's converter changes its number alone."""
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if node.op_type == "Scan" and node.domain in STANDARD:
                raise UserError(where, f"Scan {node.name} of opset 8 goes over a batch", "export at opset 9 or later")


def _names(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.name
        yield from (*node.input, *node.output)
    yield from (value.name for value in (*graph.input, *graph.output, *graph.initializer))


def _take(node: NodeProto, name: str, default: object = None) -> object:
    """The attribute's value, and the node without it."""
    for index, attribute in enumerate(node.attribute):
        if attribute.name == name:
            value = helper.get_attribute_value(attribute)
            del node.attribute[index]
            return value
    return default


def _set(node: NodeProto, name: str, value: object) -> None:
    _take(node, name)
    node.attribute.append(helper.make_attribute(name, value))


# --- one function an operator, or a change that several have -------------------------------------------------------------


def _axes(node: NodeProto, writer: Writer) -> None:
    """Axes become an input."""
    axes = _take(node, "axes")
    if axes is not None:
        node.input.append(writer.constant(f"{node.output[0]}/axes", axes))


def _clip(node: NodeProto, writer: Writer) -> str | None:
    """min and max become inputs, of x's type."""
    low, high = _take(node, "min"), _take(node, "max")
    for bound in (low, high):
        if bound is None:
            node.input.append("")
            continue
        number = writer.constant(f"{node.output[0]}/bound", bound, np.float32)
        node.input.append(writer.node("CastLike", [number, node.input[0]], number))
    return None


def _dropout(node: NodeProto, writer: Writer) -> None:
    """At inference it changes nothing, whatever its ratio."""
    _take(node, "ratio")


def _batch_norm(node: NodeProto, writer: Writer) -> str | None:
    """Without the outputs that only training has."""
    if any(node.output[1:]):
        return "it gives the statistics of training"
    del node.output[1:]
    return None


def _dft(node: NodeProto, writer: Writer) -> None:
    node.input.extend([""] * (2 - len(node.input)))
    node.input.append(writer.constant(f"{node.output[0]}/axis", _take(node, "axis", 1)))


def _grid_sample(node: NodeProto, writer: Writer) -> None:
    mode = _take(node, "mode", b"bilinear")
    _set(node, "mode", {b"bilinear": "linear", b"bicubic": "cubic"}.get(mode, mode))


def _group_norm(node: NodeProto, writer: Writer) -> None:
    """scale and bias, one number a group, become one a channel: each repeated C / groups times. Computed in x's own type."""
    groups = next(each.i for each in node.attribute if each.name == "num_groups")
    near = node.output[0]
    count = writer.node("Shape", [node.input[0]], f"{near}/channels", start=1, end=2)
    each = writer.node("Div", [count, writer.constant(f"{near}/groups", [groups])], f"{near}/group")
    shape = writer.node("Concat", [writer.constant(f"{near}/groups", [groups]), each], f"{near}/shape", axis=0)
    for index in (1, 2):
        column = writer.node("Unsqueeze", [node.input[index], writer.constant(f"{near}/axis", [1])], f"{near}/column")
        wide = writer.node("Expand", [column, shape], f"{near}/wide")
        node.input[index] = writer.node("Reshape", [wide, writer.constant(f"{near}/flat", [-1])], f"{near}/of_channels")


def _pad(node: NodeProto, writer: Writer) -> None:
    node.input.append(writer.constant(f"{node.output[0]}/pads", _take(node, "pads", [])))
    value = _take(node, "value", 0.0)
    if value:
        number = writer.constant(f"{node.output[0]}/value", value, np.float32)
        node.input.append(writer.node("CastLike", [number, node.input[0]], number))


def _resize(node: NodeProto, writer: Writer) -> None:
    """Of opset 10, and Upsample: by scales alone, from the corner, rounded down."""
    if node.op_type == "Upsample":
        node.op_type = "Resize"
    scales = node.input[1]
    del node.input[1:]
    node.input.extend(["", scales])
    _set(node, "coordinate_transformation_mode", "asymmetric")
    _set(node, "nearest_mode", "floor")


def _resize_inputs(node: NodeProto, writer: Writer) -> None:
    """An empty roi or scales is left out, which it had to be there as."""
    for index, name in enumerate(node.input[1:3], 1):
        if name in writer.weights and 0 in writer.weights[name].dims:
            node.input[index] = ""


def _roi_align(node: NodeProto, writer: Writer) -> None:
    _set(node, "coordinate_transformation_mode", "output_half_pixel")


def _scatter(node: NodeProto, writer: Writer) -> None:
    node.op_type = "ScatterElements"


def _slice(node: NodeProto, writer: Writer) -> None:
    for name in ("starts", "ends", "axes"):
        values = _take(node, name)
        if values is not None:
            node.input.append(writer.constant(f"{node.output[0]}/{name}", values))


def _split_sizes(node: NodeProto, writer: Writer) -> None:
    sizes = _take(node, "split")
    if sizes is not None:
        node.input.append(writer.constant(f"{node.output[0]}/split", sizes))


def _split_count(node: NodeProto, writer: Writer) -> None:
    """Without sizes, how many parts there are is said."""
    if len(node.input) < 2 or not node.input[1]:
        _set(node, "num_outputs", len(node.output))


def _softmax(node: NodeProto, writer: Writer) -> None:
    """Over all axes from `axis` on at once, where that is not the last one alone."""
    axis = int(_take(node, "axis", 1))
    _set(node, "axis", -1)
    rank = writer.ranks.get(node.input[0])
    if axis == -1 or (rank is not None and axis % max(rank, 1) == rank - 1):
        return
    x, result = node.input[0], node.output[0]
    sizes = writer.node("Shape", [x], f"{result}/sizes")
    node.input[0] = writer.node("Flatten", [x], f"{result}/flat", axis=axis)
    node.output[0] = writer.name(f"{result}/softmax")
    writer.after.append(helper.make_node("Reshape", [node.output[0], sizes], [result], writer.name(f"{result}/reshape")))


def _top_k(node: NodeProto, writer: Writer) -> None:
    node.input.append(writer.constant(f"{node.output[0]}/k", [_take(node, "k")]))


Adapter = Callable[[NodeProto, Writer], str | None]
ADAPTERS: dict[str, tuple[tuple[int, Adapter], ...]] = {  # below this opset, this function
    **{op: ((13 if op == "ReduceSum" else 18, _axes),) for op in REDUCTIONS},
    **dict.fromkeys(SOFTMAXES, ((13, _softmax),)),
    "BatchNormalization": ((14, _batch_norm),),
    "Clip": ((11, _clip),),
    "DFT": ((20, _dft),),
    "Dropout": ((12, _dropout),),
    "GridSample": ((20, _grid_sample),),
    "GroupNormalization": ((21, _group_norm),),
    "Pad": ((11, _pad),),
    "Resize": ((11, _resize), (18, _resize_inputs)),
    "RoiAlign": ((16, _roi_align),),
    "Scatter": ((OPSET, _scatter),),
    "Slice": ((10, _slice),),
    "Split": ((13, _split_sizes), (18, _split_count)),
    "Squeeze": ((13, _axes),),
    "TopK": ((10, _top_k),),
    "Unsqueeze": ((13, _axes),),
    "Upsample": ((OPSET, _resize),),
}
