"""The types of a graph's tensors, and their shapes where they are known, node by node from the operators' schemas, as onnxruntime
derives them when it loads a graph.

A type that an operator does not take, inputs of different types where they must be of one, shapes that do not fit, and a type
that is declared otherwise are faults of the graph. onnx's own check of a whole model cannot be asked: it says that
RMSNormalization's output has its input's type, and refuses types that came after an operator's version.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, TypeProto, helper
from onnx.checker import ValidationError
from onnx.defs import OpSchema, SchemaError
from onnx.shape_inference import InferenceError, infer_node_outputs

from suture.core.refusals import BrokenFile

SMALL = 1024  # elements of a constant whose values decide shapes
AS_FLOAT = frozenset({"tensor(bfloat16)"})  # where float32 is: operators take it in later versions, and it runs as float32
IN_TENSORRT = frozenset({"tensor(float8e4m3fn)", "tensor(float4e2m1)"})  # too, in a graph that was lowered for it
OUTPUTS_FROM = {"If": 0, "Loop": 1, "Scan": 0}  # of the outputs of a node's graphs: the first that is an output of the node
WITH_INPUTS = ("Loop", "Scan")  # of its graph
CARRIED_FROM = {"Loop": 2}  # and the first whose value a round hands to the next
FLOAT = "tensor(float)"

Types = dict[str, TypeProto]


@dataclass(frozen=True)
class Formal:
    """An input or output of a schema. `variable`: what all that share it are of one type by, or the only type."""

    variable: str
    types: frozenset[str]
    variadic: bool
    alike: bool


@dataclass(frozen=True)
class Known:
    """What holds in every graph of a model."""

    versions: Mapping[str, int]
    functions: Mapping[tuple[str, str], tuple[FunctionProto, FunctionProto]]  # as it is, and slim
    as_float: frozenset[str]
    called: dict[tuple, list[TypeProto | None]] = field(default_factory=dict)  # what a function gives, by what it is given


def check_types(model: onnx.ModelProto, slim: onnx.ModelProto, versions: Mapping[str, int]) -> None:
    """Raises BrokenFile. `slim`: the same graphs, their nodes in topological order, those without a schema in no known domain."""
    lowered = any(node.op_type.startswith("TRT_") for node in model.graph.node)
    functions = {(_domain(each.domain), each.name): (each, copy) for each, copy in zip(model.functions, slim.functions)}
    known = Known(versions, functions, AS_FLOAT | IN_TENSORRT if lowered else AS_FLOAT)
    _graph(model.graph, slim.graph, {}, known)


def _graph(graph: GraphProto, slim: GraphProto, outer: Types, known: Known) -> list[TypeProto | None]:
    """The types of the graph's outputs."""
    types = dict(outer)
    data: dict[str, TensorProto] = {}
    for value in graph.input:
        if value.type.WhichOneof("value"):
            types[value.name] = _sized(value.type)
    for tensor in graph.initializer:
        default_of = types.get(tensor.name)  # an input that has it as its default
        _constant(tensor.name, tensor, types, data)
        if default_of is not None and not _fits(types[tensor.name], default_of):
            raise BrokenFile(f"{tensor.name!r} has another type or shape as a weight than as an input")
    for sparse in graph.sparse_initializer:
        types[sparse.values.name] = helper.make_tensor_type_proto(sparse.values.data_type, list(sparse.dims))
    declared = {value.name: value.type for value in (*graph.value_info, *graph.output) if value.type.WhichOneof("value")}
    _nodes(slim.node, _by_outputs(graph.node), types, data, declared, known)
    return [types.get(value.name) for value in graph.output]


def _nodes(nodes: Iterable[NodeProto], originals: Mapping[tuple, NodeProto], types: Types, data: dict[str, TensorProto],
           declared: Types, known: Known) -> None:  # fmt: skip
    """Adds the types of all that the nodes give."""
    for node in nodes:
        original = originals.get(tuple(node.output), node)
        if (
            node.op_type == "Constant"
            and not _domain(node.domain)
            and original.attribute
            and original.attribute[0].HasField("t")
        ):
            _constant(node.output[0], original.attribute[0].t, types, data)
            continue
        for name, given in zip(node.output, _outputs(node, original, types, data, known)):
            if name and given is None:
                given = _sized(declared[name], shape=False) if name in declared else None
            elif name and "" not in (texts := (_text(given), _text(declared.get(name)))) and texts[0] != texts[1]:
                raise BrokenFile(f"{_label(node)} gives {name!r} the type {texts[0]}, and the graph says {texts[1]}")
            if name and given is not None:
                types[name] = given


def _fits(given: TypeProto, declared: TypeProto) -> bool:
    sizes = [dim.dim_value for dim in given.tensor_type.shape.dim]
    fixed = [dim.dim_value if dim.HasField("dim_value") else None for dim in declared.tensor_type.shape.dim]
    return _text(given) == _text(declared) and (
        not declared.tensor_type.HasField("shape")
        or (len(sizes) == len(fixed) and all(each in (None, size) for size, each in zip(sizes, fixed)))
    )


def _constant(name: str, tensor: TensorProto, types: Types, data: dict[str, TensorProto]) -> None:
    types[name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
    if tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= SMALL:
        data[name] = tensor


def _outputs(node: NodeProto, original: NodeProto, types: Types, data: dict, known: Known) -> list[TypeProto | None]:
    """The types of a node's outputs; None where they do not follow."""
    if functions := known.functions.get((_domain(node.domain), node.op_type)):
        return _call(*functions, node, types, known)
    graphs = [(graph, _graph(graph, slim, types, known)) for graph, slim in zip(_graphs(original), _graphs(node))]
    schema = _schema(node.op_type, _domain(node.domain), known.versions.get(_domain(node.domain), 0))
    if schema is None:
        return [None] * len(node.output)
    bound = _bound(node, schema, types, known)
    inferred = _of_graphs(node, graphs, types, known) if graphs else _inferred(original, schema, types, data, known)
    given = []
    for i, name in enumerate(node.output):
        formal, found = _formal(schema.outputs, i), inferred.get(name)
        decided = next(iter(formal.types)) if len(formal.types) == 1 else bound.get(formal.variable) if formal.alike else None
        given.append(found if decided is None or (found is not None and _text(found) == decided) else _type(decided))
    return given


def _of_graphs(node: NodeProto, graphs: list[tuple[GraphProto, list[TypeProto | None]]], types: Types, known: Known) -> Types:
    """The types of the outputs of a node with graphs, without shapes: another branch, or round, may give others."""
    if node.op_type not in OUTPUTS_FROM:
        return {}
    first = OUTPUTS_FROM[node.op_type]
    found: Types = {}
    for graph, given in graphs:
        if len(given) - first != len(node.output):
            raise BrokenFile(f"{_label(node)} has {len(node.output)} outputs, and its graph {len(given) - first} for them")
        if node.op_type in WITH_INPUTS:
            inner, outside = [(value.name, value.type) for value in graph.input], [types.get(name) for name in node.input]
            if len(inner) != len(outside) - (
                node.op_type == "Scan" and known.versions[""] < 9
            ):  # which had its sequences' lengths
                raise BrokenFile(f"{_label(node)} has {len(outside)} inputs, and its graph {len(inner)}")
            _agree(node, inner, outside[-len(inner) :])
    carried = [types.get(name) for name in node.input[CARRIED_FROM[node.op_type] :]] if node.op_type in CARRIED_FROM else []
    for given in [*(given[first:] for _, given in graphs), carried]:
        _agree(node, [(name, found.get(name)) for name in node.output], given)
        found |= {
            name: _sized(each, shape=False) for name, each in zip(node.output, given) if each is not None and name not in found
        }
    return found


def _agree(node: NodeProto, named: list[tuple[str, TypeProto | None]], given: list[TypeProto | None]) -> None:
    """Raises BrokenFile where a name is given another type than it has; an optional may be what it holds."""
    for (name, before), after in zip(named, given):
        texts = _text(before), _text(after)
        if "" not in texts and texts[0] != texts[1] and not any(text.startswith("optional") for text in texts):
            raise BrokenFile(f"{_label(node)} gives {name!r} the type {texts[1]} and {texts[0]}")


def _call(function: FunctionProto, slim: FunctionProto, node: NodeProto, types: Types, known: Known) -> list[TypeProto | None]:
    """What a function gives, inferred once for each combination of types, as functions may call others many times."""
    given = {formal: types[name] for formal, name in zip(function.input, node.input) if name in types}
    key = (_domain(node.domain), node.op_type, *(_text(given.get(formal)) for formal in function.input))
    if key not in known.called:
        inside = {name: _sized(each, shape=False) for name, each in given.items()}
        versions = {_domain(each.domain): each.version for each in function.opset_import}
        inner = replace(known, versions=versions)
        _nodes(slim.node, _by_outputs(function.node), inside, {}, {}, inner)
        known.called[key] = [inside.get(name) for name in function.output]
    return known.called[key]


def _bound(node: NodeProto, schema: "Schema", types: Types, known: Known) -> dict[str, str]:
    """The type that stands for each of the schema's type variables."""
    bound: dict[str, str] = {}
    for i, name in enumerate(node.input):
        text = _text(types.get(name))
        if not text:
            continue
        formal = _formal(schema.inputs, i)
        if text not in formal.types and not (text in known.as_float and FLOAT in formal.types):
            raise BrokenFile(
                f"{_label(node)} has {name!r} of the type {text} as input {i}, which takes {_listed(formal.types)}"
            )
        if formal.alike and bound.setdefault(formal.variable, text) != text:
            raise BrokenFile(f"{_label(node)} has inputs of the types {bound[formal.variable]} and {text}, which must be one")
    return bound


def _inferred(node: NodeProto, schema: "Schema", types: Types, data: dict[str, TensorProto], known: Known) -> Types:
    """What onnx infers, where all of the node's inputs are known; it must not fail then, as onnxruntime asks it, too."""
    if any(name and name not in types for name in node.input) or any(each.ref_attr_name for each in node.attribute):
        return {}
    given = {name: types[name] for name in node.input if name}
    imports = [helper.make_opsetid(domain, version) for domain, version in known.versions.items()]
    try:
        return infer_node_outputs(
            schema.whole, node, given, {name: data[name] for name in given if name in data}, None, imports
        )
    except InferenceError as error:
        raise BrokenFile(f"{_label(node)}: {_first_line(error)}") from None
    except ValidationError:  # of types, which are checked here
        return {}


@dataclass(frozen=True)
class Schema:
    whole: OpSchema
    inputs: tuple[Formal, ...]
    outputs: tuple[Formal, ...]


@cache
def _schema(op_type: str, domain: str, version: int) -> Schema | None:
    try:
        found = onnx.defs.get_schema(op_type, version, domain)
    except SchemaError:
        return None
    return Schema(found, *(tuple(map(_as_formal, each)) for each in (found.inputs, found.outputs)))


def _as_formal(found: OpSchema.FormalParameter) -> Formal:
    variadic = found.option == OpSchema.FormalParameterOption.Variadic
    return Formal(found.type_str, frozenset(found.types), variadic, found.is_homogeneous)


def _formal(formals: tuple[Formal, ...], i: int) -> Formal:
    return formals[min(i, len(formals) - 1)]


def _sized(given: TypeProto, shape: bool = True) -> TypeProto:
    """A copy, with the shape or without; sizes below 0 are unknown ones."""
    copy = TypeProto()
    copy.CopyFrom(given)
    if copy.HasField("tensor_type"):
        if not shape:
            copy.tensor_type.ClearField("shape")
        for dim in copy.tensor_type.shape.dim if copy.tensor_type.HasField("shape") else ():
            if dim.dim_value < 0:
                dim.Clear()
    return copy


def _text(given: TypeProto | None) -> str:
    """As schemas write it: seq(tensor(float)); empty where it is not known."""
    if given is None:
        return ""
    kind = given.WhichOneof("value")
    if kind == "tensor_type":
        return (
            f"tensor({TensorProto.DataType.Name(given.tensor_type.elem_type).lower()})" if given.tensor_type.elem_type else ""
        )
    if kind in ("sequence_type", "optional_type"):
        inner = _text(getattr(given, kind).elem_type)
        return inner and f"{'seq' if kind == 'sequence_type' else 'optional'}({inner})"
    return ""


@cache
def _type(text: str) -> TypeProto:
    kind, _, inner = text[:-1].partition("(")
    if kind == "seq":
        return helper.make_sequence_type_proto(_type(inner))
    if kind == "optional":
        return helper.make_optional_type_proto(_type(inner))
    return helper.make_tensor_type_proto(TensorProto.DataType.Value(inner.upper()), None)


def _by_outputs(nodes: Iterable[NodeProto]) -> dict[tuple[str, ...], NodeProto]:
    return {tuple(node.output): node for node in nodes}


def _graphs(node: NodeProto) -> list[GraphProto]:
    return [graph for each in node.attribute if each.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
            for graph in (each.graphs or [each.g])]  # fmt: skip


def _listed(types: frozenset[str]) -> str:
    return ", ".join(sorted(types)[:4]) + " …" * (len(types) > 4)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _label(node: NodeProto) -> str:
    return f"{node.op_type} {node.name!r}"
