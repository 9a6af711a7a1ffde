"""What is checked once of every ONNX graph, where it is read: all that onnxruntime, or a pass, would stumble over later.

One walk finds what onnx.checker does not look at (the sizes of the data inside the file, cycles, unknown types, names that
are no UTF-8); onnx.checker then reads a copy without weights, its nodes in topological order, against the operators' schemas.
TensorRT's custom operators and those that onnxruntime registers in the standard's domain have no schema there and are not checked.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, MutableSequence

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto, helper

from suture.core.onnx_types import check_types
from suture.core.refusals import BrokenFile, refusals
from suture.core.repairable import changed_operator, implied_opset, overwritten, repeated

LATEST = {"": onnx.defs.onnx_opset_version(), "com.microsoft": 1}  # opset versions, and of any other domain:
LATEST_OF_OTHERS = 1000
IMPLIED = {"com.microsoft": 1}  # what onnxruntime imports where a model does not
UNKNOWN = -1  # as some old exporters write a dimension that they do not know
LARGEST = 1 << 40  # of one dimension
DEEPEST = 20  # subgraphs in one another
MOST_NODES = 300_000  # ten times what the largest models have
DTYPES = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}
BITS = {  # of an element, where it is not whole bytes
    TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4, TensorProto.INT2: 2, TensorProto.UINT2: 2,
}  # fmt: skip
DATA = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
GRAPHS, TENSORS = (AttributeProto.GRAPH, AttributeProto.GRAPHS), (AttributeProto.TENSOR, AttributeProto.TENSORS)
SPARSE = (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS)
UNCHECKED = "unchecked"  # the domain, in the copy that onnx.checker reads, of operators without a schema
ORT_IN_STANDARD = {"SimplifiedLayerNormalization": LATEST[""], "LayerNormalization": 16}  # up to which opset
ANY = helper.make_tensor_type_proto(TensorProto.FLOAT, [])  # onnx.checker asks for a type and does not look at it


ATTRIBUTE_VALUES = frozenset(AttributeProto.DESCRIPTOR.fields_by_name) - {"name", "ref_attr_name", "doc_string", "type"}


def check_model(model: onnx.ModelProto, where: object, types: bool = True) -> None:
    """Raises UserError, naming the file `where`, for a model that is no valid ONNX, wherever its weights lie. Without `types`
    what is mixed in it may be, which surgery repairs."""
    with onnx_refusals(where):
        nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
        if next(itertools.islice(_every_node(nodes, 0), MOST_NODES, None), None) is not None:
            raise BrokenFile(f"has more than {MOST_NODES:,} nodes")
        versions = _check_imports(model)
        _check_functions(model)
        slim = onnx.ModelProto(ir_version=max(model.ir_version, 4))  # before, initializers had to be inputs
        slim.opset_import.extend(helper.make_opsetid(*entry) for entry in (versions | {UNCHECKED: 1}).items())
        for value in model.graph.input:
            _check_type(value.name, value.type, DTYPES)
        for value in model.graph.output:  # one without type has that which follows from its node
            if value.type.WhichOneof("value"):
                _check_type(value.name, value.type, DTYPES)
        _check_graph(model.graph, set(), slim.graph, versions, 0)
        for function in model.functions:
            copy = slim.functions.add()
            copy.CopyFrom(function)
            del copy.node[:]
            copy.opset_import.append(helper.make_opsetid(UNCHECKED, 1))
            _check_nodes(function.node, set(function.input), copy.node, _versions(function.opset_import), 0)
        onnx.checker.check_model(slim.SerializeToString())
        if types:
            check_types(model, slim, versions)


def onnx_refusals(where: object, what: str = "is no valid ONNX graph", remedy: str = "export it again"):
    """Around what onnx, its checker, its converter or shape inference, or graph-surgeon make of a graph."""
    return refusals(where, what, remedy)


def _check_imports(model: onnx.ModelProto) -> dict[str, int]:
    versions = IMPLIED | _versions(model.opset_import)
    functions = {function.domain for function in model.functions}
    if "" not in versions and (implied := implied_opset(model)) is not None:
        versions[""] = implied
    for domain in {_domain(node.domain) for node in model.graph.node} - set(versions) - functions:
        node = changed_operator(model) if not domain else None
        why = f", and {node.op_type} is not the same in all of them" if node is not None else ""
        raise BrokenFile(f"uses operators of {domain or 'ai.onnx'!r}, whose version its opset_import does not say{why}")
    return versions


def _versions(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    versions: dict[str, int] = {}
    for entry in imports:
        domain, latest = _domain(entry.domain), LATEST.get(_domain(entry.domain), LATEST_OF_OTHERS)
        if versions.setdefault(domain, entry.version) != entry.version:
            raise BrokenFile(f"imports two versions of the operators of {domain or 'ai.onnx'!r}")
        if not 1 <= entry.version <= latest:
            raise BrokenFile(f"imports version {entry.version} of {domain or 'ai.onnx'!r}; known are 1 to {latest}")
    return versions


def _check_functions(model: onnx.ModelProto) -> None:
    """Each is there once, none calls itself, directly or through others, and all calls written out are not too many nodes:
    two calls each in thirty functions are a billion."""
    calls: dict[tuple[str, str], list[tuple[str, str]]] = {}
    nodes: dict[tuple[str, str], int] = {}
    for function in model.functions:
        key = _domain(function.domain), function.name
        if key in calls:
            raise BrokenFile(f"has the function {function.name} twice")
        calls[key] = [(_domain(node.domain), node.op_type) for node in _every_node(function.node, 0)]
    while waiting := calls.keys() - nodes.keys():
        done = {key for key in waiting if not waiting.intersection(calls[key])}
        if not done:
            raise BrokenFile(f"has functions that call one another in a circle, {min(waiting)[1]} among them")
        nodes |= {key: sum(nodes.get(called, 1) for called in calls[key]) for key in done}
    if sum(nodes.get((_domain(node.domain), node.op_type), 1) for node in _every_node(model.graph.node, 0)) > MOST_NODES:
        raise BrokenFile(f"has more than {MOST_NODES:,} nodes, with those of its functions")


def _check_graph(graph: GraphProto, outer: set[str], slim: GraphProto, versions: dict[str, int], depth: int) -> None:
    """Checks the graph, and writes what onnx.checker shall see of it into `slim`. `outer`: names that it sees around it."""
    if depth > DEEPEST:
        raise BrokenFile(f"has subgraphs more than {DEEPEST} deep")
    slim.name = graph.name or "graph"
    for value in (*graph.input, *graph.output, *graph.value_info):
        _check_sizes(value)
    slim.input.extend(onnx.ValueInfoProto(name=value.name, type=ANY) for value in graph.input)
    slim.output.extend(onnx.ValueInfoProto(name=value.name, type=ANY) for value in graph.output)
    again = repeated(graph.initializer)
    dense = [tensor for index, tensor in enumerate(graph.initializer) if index not in again]
    tensors = [*dense, *(sparse.values for sparse in graph.sparse_initializer)]
    for tensor in (*tensors, *(sparse.indices for sparse in graph.sparse_initializer)):
        _check_tensor(tensor, tensor.name)
    slim.initializer.extend(_slim_tensor(tensor) for tensor in tensors)
    given = {value.name for value in graph.input} | {tensor.name for tensor in tensors}
    _check_nodes(graph.node, outer | given, slim.node, versions, depth)


def _check_nodes(
    nodes: Iterable[NodeProto], known: set[str], slim: MutableSequence[NodeProto], versions: dict[str, int], depth: int
) -> None:
    """Each tensor has one producer, each input some, and no node comes before itself; `slim` gets them in an order that
    says so."""
    nodes, producers, seen = list(nodes), {}, set(known)
    again = {id(node) for node in overwritten(nodes)}
    nodes = [node for node in nodes if id(node) not in again]
    for node in nodes:
        for name in filter(None, node.output):
            if name in seen:
                raise BrokenFile(f"{_label(node)} writes {name!r}, which is there already")
            seen.add(name)
            producers[name] = node
    reads = {id(node): _read(node, depth) for node in nodes}
    for node in nodes:
        if missing := reads[id(node)] - seen:
            raise BrokenFile(f"{_label(node)} reads {min(missing)!r}, which nothing produces")
        for attribute in node.attribute:
            if len(held := [field.name for field, _ in attribute.ListFields() if field.name in ATTRIBUTE_VALUES]) > 1:
                raise BrokenFile(
                    f"{_label(node)} has {' and '.join(held)} for its attribute {attribute.name!r}, which is one of them"
                )
            for tensor in _tensors(attribute):
                _check_tensor(tensor, f"{attribute.name} of {_label(node)}")
    for node in _sorted(nodes, reads, producers):
        slim.append(_slim_node(node, seen.difference(node.output), versions, depth))  # which its subgraphs do not see


def _sorted(nodes: Iterable[NodeProto], reads: dict[int, set[str]], producers: dict[str, NodeProto]) -> Iterator[NodeProto]:
    """The nodes, each after those that it reads from. Raises BrokenFile for a cycle."""
    above = {id(node): {id(producers[name]) for name in reads[id(node)] if name in producers} for node in nodes}
    readers: dict[int, list[NodeProto]] = {id(node): [] for node in nodes}
    for node in nodes:
        for producer in above[id(node)]:
            readers[producer].append(node)
    waiting = {key: len(producing) for key, producing in above.items()}
    ready = [node for node in nodes if not waiting[id(node)]]
    for node in ready:  # which grows
        yield node
        for reader in readers[id(node)]:
            waiting[id(reader)] -= 1
            if not waiting[id(reader)]:
                ready.append(reader)
    left = next((node for node in nodes if waiting[id(node)]), None)
    if left is not None:
        raise BrokenFile(f"{_label(left)} needs its own result: the graph has a cycle")


def _read(node: NodeProto, depth: int) -> set[str]:
    """The names that a node reads, its subgraphs' from around them among them."""
    if depth > DEEPEST:
        raise BrokenFile(f"has subgraphs more than {DEEPEST} deep")
    names = set(filter(None, node.input))
    for graph in _graphs(node):
        inner = set().union(*(_read(each, depth + 1) for each in graph.node))
        made = {name for each in graph.node for name in each.output} | {value.name for value in graph.input}
        tensors = {tensor.name for tensor in graph.initializer} | {each.values.name for each in graph.sparse_initializer}
        names |= inner - made - tensors
    return names


def _slim_node(node: NodeProto, known: set[str], versions: dict[str, int], depth: int) -> NodeProto:
    """The node as onnx.checker shall see it: without weights, and without what only TensorRT knows."""
    slim = NodeProto(op_type=node.op_type, name=node.name, input=node.input, output=node.output, domain=_domain(node.domain))
    sparse = [attribute for attribute in node.attribute if attribute.type in SPARSE]
    if not _domain(node.domain) and (
        sparse
        or node.op_type.startswith("TRT_")
        or versions.get("", 0) <= ORT_IN_STANDARD.get(node.op_type, -1)
        or _deprecated(node.op_type, versions.get("", 0))
    ):
        slim.domain = UNCHECKED
    for attribute in node.attribute:
        if attribute.name.startswith("TRT_") or attribute in sparse:
            continue
        copy = slim.attribute.add()
        if attribute.type in GRAPHS:
            copy.name, copy.type = attribute.name, attribute.type
            graphs = [copy.g] if attribute.type == AttributeProto.GRAPH else [copy.graphs.add() for _ in attribute.graphs]
            for graph, inner in zip(attribute.graphs or [attribute.g], graphs):
                _check_graph(graph, known, inner, versions, depth + 1)
        elif attribute.type in TENSORS:
            copy.name, copy.type = attribute.name, attribute.type
            if attribute.type == AttributeProto.TENSOR and attribute.HasField("t"):
                copy.t.CopyFrom(_slim_tensor(attribute.t))
            copy.tensors.extend(map(_slim_tensor, attribute.tensors))
        else:
            copy.CopyFrom(attribute)
    return slim


def _deprecated(op: str, version: int) -> bool:
    """Whether onnx has taken the operator back at this version: its checker refuses it, onnxruntime runs it."""
    try:
        return onnx.defs.get_schema(op, version).deprecated
    except onnx.defs.SchemaError:
        return False


def _slim_tensor(tensor: TensorProto) -> TensorProto:
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0])


def _check_tensor(tensor: TensorProto, name: str) -> None:
    """Its type is one, its sizes are, and the data inside the file are as many as these say."""
    if tensor.data_type not in DTYPES:
        raise BrokenFile(f"{name!r} has the type {tensor.data_type}, which there is not")
    if any(not 0 <= size <= LARGEST for size in tensor.dims):
        raise BrokenFile(f"{name!r} has the shape {list(tensor.dims)}")
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    count, bits = math.prod(tensor.dims), BITS.get(tensor.data_type)
    held = [field for field in DATA if len(getattr(tensor, field))]
    if tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING:
        itemsize = bits / 8 if bits else helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        found, needed = len(tensor.raw_data), math.ceil(count * itemsize)
    else:
        field = helper.tensor_dtype_to_field(tensor.data_type)
        if held not in ([], [field]):
            raise BrokenFile(f"{name!r} holds its values as {' and '.join(held)}")
        pair = tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
        found, needed = len(getattr(tensor, field)), math.ceil(count * bits / 8) if bits else count * (1 + pair)
    if found != needed:
        raise BrokenFile(f"{name!r} holds {found:,} of the {needed:,} that its shape {list(tensor.dims)} needs")


def _check_sizes(value: onnx.ValueInfoProto) -> None:
    for size in value.type.tensor_type.shape.dim:
        if not UNKNOWN <= size.dim_value <= LARGEST:
            raise BrokenFile(f"{value.name!r} has a dimension of {size.dim_value:,}")
        size.dim_param.encode()


def _check_type(name: str, given: TypeProto, dtypes: frozenset[int]) -> None:
    kind = given.WhichOneof("value")
    if kind == "sequence_type":
        _check_type(name, given.sequence_type.elem_type, dtypes)
    elif kind == "optional_type":
        _check_type(name, given.optional_type.elem_type, dtypes)
    elif kind is None:
        raise BrokenFile(f"{name!r} has no type")
    elif kind != "map_type" and (dtype := getattr(given, kind).elem_type) not in dtypes:
        raise BrokenFile(f"{name!r} has the type {dtype}, which there is not")


def _tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    for sparse in ([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []) + [*attribute.sparse_tensors]:
        yield from (sparse.values, sparse.indices)


def _graphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _every_node(nodes: Iterable[NodeProto], depth: int) -> Iterator[NodeProto]:
    if depth > DEEPEST:
        raise BrokenFile(f"has subgraphs more than {DEEPEST} deep")
    for node in nodes:
        yield node
        for graph in _graphs(node):
            yield from _every_node(graph.node, depth + 1)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _label(node: NodeProto) -> str:
    return f"{node.op_type} {node.name!r}"
