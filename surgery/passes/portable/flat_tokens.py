"""Work on tokens as rows: [B, S, features] goes through norms, activations and residual sums as [B*S, features].

    f(reshape(a, [B, S, n]))  =  reshape(f(a), [B, S, n])        where f works on each token alone

so that the reshapes around every Gemm meet and cancel, and are left only around attention, the embedding and the logits.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, onnx_type, op_of, producer, rank, static_dim
from suture.surgery.graph.files import sort
from suture.surgery.passes.portable.linear import rows_by

ELEMENTWISE = ("Add", "Mul", "Sub", "Div", "Swish", "Gelu", "Relu", "Tanh", "Sigmoid", "Cast")
NORMS = ("RMSNormalization", "LayerNormalization")


def run(graph: Graph) -> int:
    matches = graph.match(_flatten_embedding, graph.nodes("Gather")) + _flatten_given(graph)
    sort(graph)
    matches += graph.match(_move_below, graph.nodes(*ELEMENTWISE, *NORMS, "Split"))
    return matches + graph.match(_cancel, graph.nodes("Reshape"))


def _flatten_embedding(graph: Graph, gather: gs.Node) -> bool:
    """Looks up rows and sees them as [B, S, n] again, which later moves down."""
    table, tokens = gather.inputs
    embedded = gather.outputs[0]
    if gather.attrs.get("axis", 0) != 0 or rank(table) != 2:
        return False
    if tokens.name != graph.signature.tokens or rank(embedded) != 3 or (features := static_dim(embedded, 2)) is None:
        return False
    if not any(node.op in (*ELEMENTWISE, *NORMS) for node in embedded.outputs):
        return False
    rows = graph.new("Reshape", [tokens, graph.int64([-1])], shape=["tokens"])
    flat = graph.new("Gather", [table, rows], {"axis": 0}, name=gather.name, dtype=onnx_type(embedded))
    flat.shape = ["tokens", features]
    graph.replace(embedded, "Reshape", [flat, rows_by(graph, embedded, features)])
    return True


def _flatten_given(graph: Graph) -> int:
    """The same for embeddings that the graph is given."""
    width = graph.signature.embedding_width
    if width is None:
        return 0
    given = graph.input(graph.signature.tokens)
    readers = [node for node in given.outputs if op_of(node) in (*ELEMENTWISE, *NORMS)]
    if not readers:
        return 0
    flat = graph.new("Reshape", [given, graph.int64([-1, width])], shape=["tokens", width])
    rows = graph.new("Reshape", [flat, rows_by(graph, given, width)], shape=list(given.shape))
    for node in readers:
        node.inputs = [rows if tensor is given else tensor for tensor in node.inputs]
    return 1


def _move_below(graph: Graph, node: gs.Node) -> bool:
    first = node.inputs[0]
    activations = node.inputs[:1] if node.op in (*NORMS, "Split", "Cast") else node.inputs
    flats = [_flat(tensor) for tensor in activations]
    if not any(flat is not None for flat in flats) or (node.op in NORMS and node.attrs.get("axis", -1) not in (-1, 2)):
        return False
    if node.op == "Split" and node.attrs.get("axis", 0) not in (-1, 2):
        return False
    shared = [rank(tensor) in (0, 1) and flat is None for tensor, flat in zip(activations, flats)]
    if not all(flat is not None or free for flat, free in zip(flats, shared)) or rank(first) is None:
        return False
    rows = next(tensor for tensor, flat in zip(activations, flats) if flat is not None)
    shape = producer(rows).inputs[1]
    inputs = [tensor if flat is None else flat for tensor, flat in zip(activations, flats)] + node.inputs[len(activations) :]
    attrs = dict(node.attrs) | ({"axis": -1} if node.op in (*NORMS, "Split") else {})
    outputs = list(node.outputs)
    fresh = []
    for output in outputs:
        features = static_dim(output, 2)
        if features is None:
            return False
        fresh.append(gs.Variable(graph.unique(f"{output.name}_rows"), onnx_type(output), ["tokens", features]))
    graph.gs.nodes.append(gs.Node(node.op, node.name, attrs, inputs, fresh, node.domain))
    for output, flat in zip(outputs, fresh):
        features = static_dim(output, 2)
        target = shape if features == _last(graph, shape) else rows_by(graph, rows, features)
        graph.replace(output, "Reshape", [flat, target], name=f"{node.name}/reshape")
    return True


def _flat(tensor: gs.Tensor) -> gs.Tensor | None:
    """a, if `tensor` is reshape(a, [B, S, n]) of rows a."""
    reshape = producer(tensor, "Reshape")
    if reshape is None or rank(tensor) != 3 or rank(reshape.inputs[0]) != 2:
        return None
    features = static_dim(tensor, 2)
    return reshape.inputs[0] if features is not None and features == static_dim(reshape.inputs[0], 1) else None


def _last(graph: Graph, shape: gs.Tensor) -> int | None:
    """The last entry of a computed shape [B, S, features]."""
    concat = producer(shape, "Concat")
    return graph.scalar(concat.inputs[-1]) if concat is not None else None


def _cancel(graph: Graph, reshape: gs.Node) -> bool:
    """Two reshapes in a row are the second alone; one that ends where the first began is none."""
    first = producer(reshape.inputs[0], "Reshape")
    if first is None:
        return False
    source, result = first.inputs[0], reshape.outputs[0]
    same = rank(result) == rank(source) == 2 and static_dim(result, 1) == static_dim(source, 1) is not None
    if same and not graph.is_output(result):
        graph.redirect(result, source)
        return True
    target = reshape.inputs[1]
    concat = producer(target, "Concat")
    for part in concat.inputs if concat is not None else [target]:
        numbers = graph.constant(part)
        if numbers is not None and (numbers == 0).any():
            return False  # a zero copies a dimension of what comes in
    reshape.inputs[0] = source
    return True
