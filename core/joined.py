"""Two graphs as one: outputs of the first are inputs of the second, and inputs of one name are one input.

first(a) → (b, c), second(a, b) → d    →    joined(a) → (c, d)

What is inside keeps its names, but where both graphs use one, or where one would be that of an input or output: then the
second's, or the first's inner one, gets another. Axes are of one name only where they belong to one tensor.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from suture.core.errors import UserError
from suture.core.subgraphs import all_graphs
from suture.core.traits import STANDARD

Names = dict[str, str]


@dataclass(frozen=True)
class Joined:
    """`model`: of both. `connected`: by input of the second, the output of the first that it reads; `shared`: inputs of both."""

    model: ModelProto
    connected: Names
    shared: tuple[str, ...]


def join(
    first: ModelProto, second: ModelProto, where: tuple[object, object], connect: Mapping[str, str] | None = None,
    rename: Mapping[str, str] | None = None, keep: Collection[str] = (),
) -> Joined:  # fmt: skip
    """Joins two models of the same opset, whose external weights lie under one root.

    `where`: what errors call each. `connect`: by input of the second, an output of the first, beside those of equal names.
    `rename`: by input or output of the second, what it is called in the result. `keep`: outputs of the first that stay outputs
    though the second reads them. Raises UserError for names that there are not, types or sizes that do not go together, and
    inputs or outputs that would be of one name."""
    connect, rename = dict(connect or {}), dict(rename or {})
    first, second = _copy(first), _copy(second)
    ends = Ends(first.graph, second.graph, where, rename)
    ends.check(connect, rename, keep)
    connected = ends.connections(connect)
    shared = [name for name in ends.takes if name not in connected and rename.get(name, name) in ends.given]
    for name, output in connected.items():
        _alike(ends.gives[output], ends.takes[name], where, "connect")
    for name in shared:
        _alike(ends.given[rename.get(name, name)], ends.takes[name], where, "share")
    kept = [name for name in ends.gives if name not in connected.values() or name in keep]
    ends.refuse_twice(kept, [name for name in ends.takes if name not in {*connected, *shared}])

    own = {name: rename.get(name, name) for name in (*ends.takes, *ends.makes)}
    outer = {*ends.given, *kept, *(own[name] for name in own if name not in connected or name in ends.makes)}
    taken = {*_names(first.graph), *_names(second.graph), *outer}
    inner = {name: _free(name, taken) for name in outer - {*ends.given, *kept} if name in _names(first.graph)}
    _rename(first.graph, inner)
    used = outer | _names(first.graph).keys()
    names = {name: _free(name, taken) for name in _names(second.graph) if name in used and name not in own}
    names |= own | {name: inner.get(output, output) for name, output in connected.items()}
    _rename(second.graph, names)
    _name_nodes(first.graph, second.graph)
    axes = _axes([(ends.gives[output], ends.takes[name]) for name, output in connected.items()]
                 + [(ends.given[own[name]], ends.takes[name]) for name in shared])  # fmt: skip
    _rename_axes(second.graph, axes, _symbols(first.graph))
    for name in shared:
        _fix_sizes(ends.given[own[name]], ends.takes[name])

    graph = GraphProto(name=f"{first.graph.name or 'first'}_{second.graph.name or 'second'}")
    graph.node.extend([*first.graph.node, *second.graph.node])
    for name in ends.makes:
        if names[name] != own[name]:  # the second gives what it takes from the first
            graph.node.append(helper.make_node("Identity", [names[name]], [own[name]], f"{own[name]}/given"))
    inputs = [*ends.given.values(), *(value for name, value in ends.takes.items() if name not in {*connected, *shared})]
    graph.input.extend(inputs)
    graph.output.extend([*(ends.gives[name] for name in kept), *ends.makes.values()])
    for name, value in zip(ends.makes, graph.output[len(kept) :]):
        value.name = own[name]
    for part in (first.graph, second.graph):
        graph.initializer.extend(part.initializer)
        graph.sparse_initializer.extend(part.sparse_initializer)
        graph.quantization_annotation.extend(part.quantization_annotation)
    outside = {value.name for value in (*graph.input, *graph.output)}
    values = (*second.graph.value_info, *first.graph.value_info, *(ends.gives[name] for name in connected.values()))
    inside = {value.name: value for value in values if value.name not in outside and value.type.WhichOneof("value")}
    graph.value_info.extend(inside.values())
    _share_weights(graph)
    return Joined(_model(first, second, graph, where), connected, tuple(own[name] for name in shared))


class Ends:
    """Inputs and outputs: `given` and `gives` of the first, `takes` and `makes` of the second, by its own names."""

    def __init__(self, first: GraphProto, second: GraphProto, where: tuple[object, object], rename: Names):
        self.given, self.takes = _inputs(first), _inputs(second)
        self.gives, self.makes = ({value.name: value for value in graph.output} for graph in (first, second))
        self.where, self.rename = where, rename

    def check(self, connect: Names, rename: Names, keep: Collection[str]) -> None:
        """That there is all that was named."""
        for name, output in connect.items():
            _need(output, self.gives, self.where[0], "output")
            _need(name, self.takes, self.where[1], "input")
        for name in rename:
            _need(name, self.takes | self.makes, self.where[1], "input or output")
        for name in keep:
            _need(name, self.gives, self.where[0], "output")

    def connections(self, connect: Names) -> Names:
        """By input of the second, the output of the first."""
        found = {name: self.rename.get(name, name) for name in self.takes if self.rename.get(name, name) in self.gives}
        found |= connect
        if not found:
            what = f"its outputs {', '.join(self.gives)} are none of the inputs {', '.join(self.takes)} of {self.where[1]}"
            raise UserError(self.where[0], what, "say which with --connect OUTPUT=INPUT")
        return found

    def refuse_twice(self, kept: list[str], taken: list[str]) -> None:
        """Where two of the result's inputs and outputs would have one name. `kept`: outputs of the first; `taken`: inputs of the
        second that are the result's."""
        seen = {*self.given, *kept}
        for name in (*taken, *self.makes):
            final = self.rename.get(name, name)
            if final in seen and not (name in self.makes and name in taken):  # given as it is taken
                what = f"{name} would be {final}, as another input or output is"
                raise UserError(self.where[1], what, f"call it otherwise with --rename {name}=NAME")
            seen.add(final)


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _inputs(graph: GraphProto) -> dict[str, ValueInfoProto]:
    weights = {tensor.name for tensor in graph.initializer}
    return {value.name: value for value in graph.input if value.name not in weights}


def _need(name: str, there: Iterable[str], where: object, what: str) -> None:
    if name not in there:
        raise UserError(where, f"has no {what} {name}", f"choose from {', '.join(there)}")


def _alike(one: ValueInfoProto, other: ValueInfoProto, where: tuple[object, object], verb: str) -> None:
    """Raises UserError where what the first declares for a tensor cannot be what the second does."""
    first, second = one.type, other.type
    if first.WhichOneof("value") is None:  # an output without type has that which follows from its node
        return
    if not (first.HasField("tensor_type") and second.HasField("tensor_type")):
        same = first == second
    else:
        same = first.tensor_type.elem_type in (second.tensor_type.elem_type, TensorProto.UNDEFINED)
        if first.tensor_type.HasField("shape") and second.tensor_type.HasField("shape"):
            sizes = [first.tensor_type.shape.dim, second.tensor_type.shape.dim]
            same &= len(sizes[0]) == len(sizes[1])
            same &= all(_size(a) == _size(b) or None in (_size(a), _size(b)) for a, b in zip(*sizes))
    if not same:
        what = f"its {other.name} is {_said(second)}, and {one.name} of {where[0]} {_said(first)}"
        remedy = f"--rename {other.name}=NAME keeps them apart" if verb == "share" else "export both alike"
        raise UserError(where[1], what, remedy)


def _said(given: onnx.TypeProto) -> str:
    if not given.HasField("tensor_type"):
        return f"a {str(given.WhichOneof('value')).removesuffix('_type')}"
    tensor = given.tensor_type
    sizes = ", ".join(str(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?") for dim in tensor.shape.dim)
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()}" + (f" [{sizes}]" if tensor.HasField("shape") else "")


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | None:
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None


# --- names ----------------------------------------------------------------------------------------------------------------


def _names(graph: GraphProto) -> dict[str, None]:
    """All tensors, those of subgraphs among them, in order."""
    found: dict[str, None] = {}
    for each in all_graphs(graph):
        for node in each.node:
            found |= dict.fromkeys((*node.input, *node.output))
        found |= dict.fromkeys(value.name for value in (*each.input, *each.output))
        found |= dict.fromkeys(tensor.name for tensor in each.initializer)
        found |= dict.fromkeys(sparse.values.name for sparse in each.sparse_initializer)
    found.pop("", None)
    return found


def _free(name: str, taken: set[str]) -> str:
    number = 1
    while (free := f"{name}_{number}") in taken:
        number += 1
    taken.add(free)
    return free


def _rename(graph: GraphProto, names: Names) -> None:
    for each in all_graphs(graph):
        for node in each.node:
            for side in (node.input, node.output):
                side[:] = [names.get(name, name) for name in side]
        tensors = [*each.initializer, *(sparse.values for sparse in each.sparse_initializer)]
        for value in (*each.input, *each.output, *each.value_info, *tensors):
            value.name = names.get(value.name, value.name)
        for annotation in each.quantization_annotation:
            annotation.tensor_name = names.get(annotation.tensor_name, annotation.tensor_name)
            for entry in annotation.quant_parameter_tensor_names:
                entry.value = names.get(entry.value, entry.value)


def _name_nodes(first: GraphProto, second: GraphProto) -> None:
    """No node of the second is called as one of the first."""
    used = {node.name for graph in all_graphs(first) for node in graph.node}
    taken = used | {node.name for graph in all_graphs(second) for node in graph.node}
    for graph in all_graphs(second):
        for node in graph.node:
            if node.name and node.name in used:
                node.name = _free(node.name, taken)


# --- axes -----------------------------------------------------------------------------------------------------------------


def _axes(pairs: list[tuple[ValueInfoProto, ValueInfoProto]]) -> Names:
    """What the first calls an axis of a tensor that both have, by what the second does."""
    found: Names = {}
    for one, other in pairs:
        for first, second in zip(one.type.tensor_type.shape.dim, other.type.tensor_type.shape.dim):
            if first.dim_param and second.dim_param:
                found.setdefault(second.dim_param, first.dim_param)
    return found


def _symbols(graph: GraphProto) -> set[str]:
    values = [value for each in all_graphs(graph) for value in (*each.input, *each.output, *each.value_info)]
    return {name for value in values for dim in _dims(value) for name in re.split(r"\s*\+\s*", dim.dim_param)}


def _rename_axes(graph: GraphProto, axes: Names, used: set[str]) -> None:
    """Calls the axes as the first does where they are its own, and otherwise by no name that it has. A sum of names stays one."""
    own = _symbols(graph)
    taken = used | own | set(axes.values())
    apart = {name: _free(name, taken) for name in sorted(own) if name in used and name not in axes and not name.isdigit()}
    known = {**apart, **axes}
    known.pop("", None)
    for each in all_graphs(graph):
        for value in (*each.input, *each.output, *each.value_info):
            for dim in _dims(value):
                if dim.dim_param:
                    whole = known.get(dim.dim_param)
                    parts = (known.get(name, name) for name in re.split(r"\s*\+\s*", dim.dim_param))
                    dim.dim_param = whole or " + ".join(parts)


def _dims(value: ValueInfoProto) -> Iterable[onnx.TensorShapeProto.Dimension]:
    return value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ()


def _fix_sizes(one: ValueInfoProto, other: ValueInfoProto) -> None:
    """What either fixes of a shared input is fixed."""
    if one.type.HasField("tensor_type") and not one.type.tensor_type.HasField("shape"):
        one.type.CopyFrom(other.type)
    for first, second in zip(_dims(one), _dims(other)):
        if _size(second) is not None:
            first.dim_value = second.dim_value


# --- the model ------------------------------------------------------------------------------------------------------------


def _share_weights(graph: GraphProto) -> None:
    """Weights that lie at one place of one file are one. Equal ones elsewhere are left alone: a file may yet be filled."""
    seen: dict[tuple, str] = {}
    names: Names = {}
    outputs = {value.name for value in graph.output}
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in outputs:
            place = tuple(sorted((entry.key, entry.value) for entry in tensor.external_data if entry.key != "checksum"))
            same = seen.setdefault((place, tensor.data_type, tuple(tensor.dims)), tensor.name)
            if same != tensor.name:
                names[tensor.name] = same
    kept = [tensor for tensor in graph.initializer if tensor.name not in names]
    if names:
        kept = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        for each in all_graphs(graph):
            for node in each.node:
                node.input[:] = [names.get(name, name) for name in node.input]


def _model(first: ModelProto, second: ModelProto, graph: GraphProto, where: tuple[object, object]) -> ModelProto:
    model = ModelProto(ir_version=max(first.ir_version, second.ir_version), producer_name=first.producer_name, graph=graph)
    versions: dict[str, int] = {}
    for entry in (*first.opset_import, *second.opset_import):
        domain = "" if entry.domain in STANDARD else entry.domain
        if versions.setdefault(domain, entry.version) != entry.version:
            what = f"is of version {entry.version} of {domain or 'ai.onnx'}, and {where[0]} of {versions[domain]}"
            raise UserError(where[1], what, "export both at one version")
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())
    functions: dict[tuple[str, str, str], onnx.FunctionProto] = {}
    for each in (*first.functions, *second.functions):
        if functions.setdefault((each.domain, each.name, each.overload), each) != each:
            raise UserError(where[1], f"its function {each.name} is another than {where[0]} has", "inline it (onnx.inliner)")
    model.functions.extend(functions.values())
    metadata = {entry.key: entry.value for entry in first.metadata_props}
    theirs = {entry.key: entry.value for entry in second.metadata_props}
    both = {key: value for key, value in (metadata | theirs).items() if metadata.get(key, value) == theirs.get(key, value)}
    helper.set_model_props(model, both)
    return model
