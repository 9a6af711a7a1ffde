"""Two nodes that compute the same thing become one: same op, attributes and inputs; equal small constants are one, too.

Exporters write shape arithmetic, masks and positions once for each layer; later passes then find them shared.
"""

import hashlib

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from suture.core.traits import STANDARD
from suture.surgery.graph import Graph, is_weight_file
from suture.surgery.graph.files import sort

RANDOM = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
    "Dropout",
}


def run(graph: Graph) -> int:
    _share_constants(graph)
    sort(graph)
    seen: dict[tuple, gs.Node] = {}
    return graph.match(lambda graph, node: _share(graph, node, seen), list(graph.gs.nodes))


def _share_constants(graph: Graph) -> None:
    """Constants that lie in the graph itself. Weights beside it are left alone: that two are equal today (zero biases,
    norms of ones, a checkpoint not yet filled) says nothing of the bytes that their files will hold."""
    seen: dict[tuple, gs.Constant] = {}
    for tensor in graph.gs.tensors(check_duplicates=False).values():
        values = None if is_weight_file(tensor) else graph.constant(tensor)
        if values is None:
            continue
        key = (str(values.dtype), values.shape, hashlib.sha256(values.tobytes()).digest())
        first = seen.setdefault(key, tensor)
        if first is not tensor:
            for node in list(tensor.outputs):
                node.inputs = [first if t is tensor else t for t in node.inputs]


def _share(graph: Graph, node: gs.Node, seen: dict[tuple, gs.Node]) -> bool:
    if node.op in RANDOM or any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return False
    domain = "" if node.domain in STANDARD else node.domain
    key = (domain, node.op, _attributes(node), tuple(map(_identity, node.inputs)), len(node.outputs))
    first = seen.setdefault(key, node)
    if first is node or any(graph.is_output(output) for output in node.outputs):
        return False
    for output, same in zip(node.outputs, first.outputs):
        graph.redirect(output, same)
    return True


def _identity(tensor: gs.Tensor) -> int | None:
    return None if tensor.is_empty() else id(tensor)


def _attributes(node: gs.Node) -> tuple:
    return tuple(sorted((name, _value(value)) for name, value in node.attrs.items()))


def _value(value: object) -> str:
    if isinstance(value, gs.Constant) and isinstance(value._values, LazyValues):
        return value._values.tensor.SerializeToString().hex()
    return repr(value)
