"""Repairs of a source whose meaning is clear, each reported; what is not clear is refused.

a domain of known version that is used and not imported      →  its import; the standard's, where its operators leave one
two Constants that write one tensor                           →  the last one, as onnxruntime reads it
two initializers of one name and the same values              →  one
two nodes of one name                                         →  a name each
nodes before those that they read from                        →  in order, without which onnx infers nothing
float16 and float32, or int32 and int64, where an operator    →  a Cast, as torch promotes: to what the graph declares for
takes one type                                                   the result; else a number follows the tensor beside it,
                                                                 and of two tensors the narrower one is widened
an output of another type than it is declared                 →  a Cast
an empty constant in a Concat, along its empty axis           →  left out: onnxruntime looks at none of its other sizes, by
                                                                 which inference would fix those of the result
"""

from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path

import onnx
import onnx.inliner
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from suture.core.errors import UserError
from suture.core.onnx_checks import check_model, onnx_refusals
from suture.core.repairable import implied_opset, overwritten, repeated
from suture.core.signature import FLOATS
from suture.core.subgraphs import all_nodes, reads, subgraphs
from suture.core.traits import MICROSOFT, STANDARD
from suture.core.weights import load_graph

GENERATION = ("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch")  # loops over whole decoders, as one operator


def repair(model: ModelProto, where: object) -> list[str]:
    """Repairs the model in place; one line for each repair. Raises UserError for what cannot be repaired, and for what is
    still not valid then."""
    nodes = list(all_nodes(model.graph))
    for node in nodes:
        if node.domain == MICROSOFT and node.op_type in GENERATION:
            what = f"{MICROSOFT}.{node.op_type} {node.name} generates inside the graph, around a decoder of its own"
            raise UserError(where, what, "give the decoder, and generate outside")
    _inline_functions(model, where)
    _one_standard(model)
    constants = [*_constants(model.graph), *_initializers(model.graph)]
    ordered = _order(model.graph, where)
    _leave_out_empty(model.graph)
    nodes = list(all_nodes(model.graph))
    notes = [*constants, *ordered, *_imports(model, nodes, where), *_node_names(nodes)]
    try:
        check_model(model, where)
    except UserError:
        types = _types(model)
        if not types:
            raise
        check_model(model, where)
        notes += types
    return notes


def load_repaired(path: Path) -> tuple[ModelProto, list[str]]:
    """As load_graph, repaired; and one line for each repair: none where the graph is as it stands in the file."""
    model = load_graph(path, types=False)
    try:
        notes = repair(model, path)
    except UserError:
        return load_graph(path), []  # which is valid, although surgery takes none of its kind, or says itself what it is not
    return (model, notes) if notes else (load_graph(path), [])


def _inline_functions(model: ModelProto, where: object) -> None:
    """A model's own functions, of whatever opset, in the place of the nodes that call them: passes know none."""
    if not model.functions:
        return
    with onnx_refusals(where, "has functions that do not fit into its graph"):
        model.CopyFrom(onnx.inliner.inline_local_functions(model, convert_version=True))


def _one_standard(model: ModelProto) -> None:
    """The standard's domain is "", whatever a file calls it."""
    for entry in (*model.opset_import, *all_nodes(model.graph)):
        if entry.domain in STANDARD:
            entry.domain = ""


def _constants(graph: GraphProto) -> list[str]:
    again = overwritten(graph.node)
    for node in again:
        graph.node.remove(node)  # the first that is equal, and it is: a later one of the same bytes stays
    names = list(dict.fromkeys(node.output[0] for node in again))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"two Constants write {names[0]}{more}: the last is taken, as onnxruntime does"] if names else []


def _initializers(graph: GraphProto) -> list[str]:
    again = repeated(graph.initializer)
    if not again:
        return []
    kept = [tensor for index, tensor in enumerate(graph.initializer) if index not in again]
    names = sorted({graph.initializer[index].name for index in again})
    kept = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"the source has the weight {names[0]}{more} twice, with the same values: one is taken"]


def _order(graph: GraphProto, where: object) -> list[str]:
    """Of the nodes that may come next, the first as they stand."""
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    above = [{maker[name] for name in reads(node) if name in maker} for node in graph.node]
    if all(index > max(own, default=-1) for index, own in enumerate(above)):
        return []
    below: list[list[int]] = [[] for _ in above]
    for index, own in enumerate(above):
        for each in own:
            below[each].append(index)
    missing, order = [len(own) for own in above], []
    ready = [index for index, count in enumerate(missing) if not count]
    while ready:
        index = heappop(ready)
        order.append(index)
        for each in below[index]:
            missing[each] -= 1
            if not missing[each]:
                heappush(ready, each)
    if len(order) < len(missing):
        node = graph.node[min(set(range(len(missing))) - set(order))]
        raise UserError(where, f"{node.op_type} {node.name!r} comes before itself: its nodes form a cycle", "export it again")
    nodes = [NodeProto.FromString(graph.node[index].SerializeToString()) for index in order]
    del graph.node[:]
    graph.node.extend(nodes)
    return ["the source's nodes do not stand in order: they are put so"]


def _leave_out_empty(graph: GraphProto) -> None:
    sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
    sizes |= {node.output[0]: each.t.dims for node in graph.node if node.op_type == "Constant" for each in node.attribute}
    for node in graph.node:
        if node.op_type != "Concat" or node.domain not in STANDARD:
            continue
        axis = next((each.i for each in node.attribute if each.name == "axis"), 0)
        kept = [name for name in node.input if name not in sizes or not _empty(sizes[name], axis)]
        if kept:
            node.input[:] = kept
        elif len(node.input) == 1:
            sizes[node.output[0]] = sizes[node.input[0]]


def _empty(dims: Sequence[int], axis: int) -> bool:
    return -len(dims) <= axis < len(dims) and dims[axis] == 0


def _imports(model: ModelProto, nodes: list[NodeProto], where: object) -> list[str]:
    imported = {"" if entry.domain in STANDARD else entry.domain for entry in model.opset_import}
    imported |= {function.domain for function in model.functions}
    missing = {"" if node.domain in STANDARD else node.domain: node for node in reversed(nodes)}
    notes = []
    for domain, node in missing.items():
        if domain in imported:
            continue
        implied = 1 if domain == MICROSOFT else implied_opset(model) if not domain else None
        if implied is None:
            what = f"{node.op_type} {node.name} is of {domain or 'ai.onnx'}, whose version the opset_import does not say"
            raise UserError(where, what, "export it again")
        model.opset_import.append(helper.make_opsetid(domain, implied))
        called = domain or "ai.onnx"
        notes.append(f"the source does not import {called}, whose operators it uses: version {implied} is taken")
    return notes


def _node_names(nodes: list[NodeProto]) -> list[str]:
    names, notes = Counter(node.name for node in nodes if node.name), []
    for name in [name for name, count in names.items() if count > 1]:
        notes.append(f"{names[name]} nodes of the source are called {name}: they get a name each")
        for number, node in enumerate((node for node in nodes if node.name == name), 1):
            while number > 1 and (node.name == name or node.name in names):
                node.name, number = f"{name}_{number}", number + 1
            names[node.name] += 1
    return notes


# --- types ----------------------------------------------------------------------------------------------------------------


KINDS = ((*FLOATS, TensorProto.DOUBLE), (TensorProto.INT32, TensorProto.INT64))  # types that torch promotes among themselves
WIDEST = {KINDS[0]: (TensorProto.FLOAT, TensorProto.DOUBLE), KINDS[1]: (TensorProto.INT64, TensorProto.INT64)}


def _types(model: ModelProto) -> list[str]:
    """Casts where an operator takes one type and is given several, in all graphs."""
    version = next((entry.version for entry in model.opset_import if entry.domain in STANDARD), 1)
    notes: list[str] = []
    _cast_mixed(model.graph, {}, set(), version, notes)
    return notes


def _cast_mixed(graph: GraphProto, types: dict[str, int], small: set[str], version: int, notes: list[str]) -> None:
    """`types` and `small`: of what lies around the graph, the types and the names of numbers; of both, copies grow."""
    numbers = {tensor.name: tensor for tensor in graph.initializer}
    types = types | {name: tensor.data_type for name, tensor in numbers.items()}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.input if value.type.HasField("tensor_type")}
    declared = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    small = small | {name for name, tensor in numbers.items() if not tensor.dims}
    small |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    nodes, cast, before = [], {}, len(notes)
    for node in graph.node:
        for inner in subgraphs(node):
            _cast_mixed(inner, types, small, version, notes)
        schema = _schema(node, version)
        for names in _alike(node, schema).values():
            kind = next((each for each in KINDS if len({types.get(name, 0) for name in names} & set(each)) > 1), None)
            if kind is None:
                continue
            found = {types.get(name, 0) for name in names} & set(kind)
            target = _target(node, names, types, kind, small, declared)
            for index, name in enumerate(node.input):
                if name in names and types.get(name, target) in kind and types.get(name, target) != target:
                    if (name, target) not in cast:
                        cast[name, target] = f"{name}/{TensorProto.DataType.Name(target).lower()}"
                        nodes.append(helper.make_node("Cast", [name], [cast[name, target]], to=target))
                        types[cast[name, target]] = target
                    node.input[index] = cast[name, target]
            kinds = " and ".join(sorted(TensorProto.DataType.Name(each).lower() for each in found))
            named = node.name or f"that makes {node.output[0]}"
            notes.append(f"{node.op_type} {named} mixes {kinds}: a Cast to {TensorProto.DataType.Name(target).lower()}")
        nodes.append(node)
        for name, result in zip(node.output, _results(node, schema, types, declared)):
            types[name] = result
    for value in graph.output:
        wanted, computed = declared.get(value.name, 0), types.get(value.name, 0)
        if wanted != computed and any(wanted in kind and computed in kind for kind in KINDS):
            inner = f"{value.name}/as_computed"
            for node in nodes:
                for names in (node.input, node.output):
                    names[:] = [inner if name == value.name else name for name in names]
            nodes.append(helper.make_node("Cast", [inner], [value.name], to=wanted))
            notes.append(f"the output {value.name} is computed in another type than it is declared: a Cast")
    false = [name for value in graph.value_info if (name := value.name) in types and types[name] not in (0, declared[name])]
    if false:
        more = f" and {len(false) - 1} more" if len(false) > 1 else ""
        notes.append(f"what the source says of the type of {false[0]}{more} is not what its node gives: it is left out")
    if len(notes) > before:
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
        kept = [value for value in graph.value_info if types.get(value.name, 0) in (0, value.type.tensor_type.elem_type)]
        kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
        del graph.value_info[:]
        graph.value_info.extend(kept)


def _schema(node: NodeProto, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, version, "") if node.domain in STANDARD else None
    except onnx.defs.SchemaError:
        return None


def _type_names(sides: list, count: int) -> list[str]:
    """By position; a variadic parameter's for all that follow."""
    return [sides[min(index, len(sides) - 1)].type_str for index in range(count)] if sides else []


def _alike(node: NodeProto, schema: onnx.defs.OpSchema | None) -> dict[str, list[str]]:
    """The inputs that must be of one type, by what the schema calls it."""
    alike: dict[str, list[str]] = {}
    if schema is not None:
        for name, kind in zip(node.input, _type_names(list(schema.inputs), len(node.input))):
            if name:
                alike.setdefault(kind, []).append(name)
    return {kind: names for kind, names in alike.items() if len(names) > 1}


def _target(node: NodeProto, names: list[str], types: dict, kind: tuple[int, ...], small: set, declared: dict) -> int:
    if declared.get(node.output[0]) in {types.get(name, 0) for name in names} & set(kind):
        return declared[node.output[0]]
    tensors = {types[name] for name in names if name not in small and types.get(name) in kind}
    wide, widest = WIDEST[kind]
    return tensors.pop() if len(tensors) == 1 else widest if widest in tensors else wide


def _results(node: NodeProto, schema: onnx.defs.OpSchema | None, types: dict, declared: dict) -> list[int]:
    """The outputs' types: what the schema ties to an input, what the attributes say, else what is declared."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Cast" and "to" in attributes:
        return [attributes["to"].i]
    if node.op_type == "Constant" and "value" in attributes:
        return [attributes["value"].t.data_type]
    if schema is None:
        first = types.get(node.input[0], 0) if node.input else 0
        return [declared.get(name, 0) or (first if first in FLOATS else 0) for name in node.output]
    given = dict(zip(_type_names(list(schema.inputs), len(node.input)), (types.get(name, 0) for name in node.input)))
    results = []
    for name, kind in zip(node.output, _type_names(list(schema.outputs), len(node.output))):
        single = kind.removeprefix("tensor(").removesuffix(")").upper()
        fixed = TensorProto.DataType.Value(single) if single in TensorProto.DataType.keys() else 0  # noqa: SIM118 (an enum wrapper)
        results.append(given.get(kind, 0) or fixed or declared.get(name, 0))
    return results
