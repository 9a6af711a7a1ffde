"""Every node that TensorRT's parser refuses: it stops at the first that it cannot import, so refused nodes are cut out,
their outputs made inputs, and the rest is read again."""

import contextlib
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from suture.core.dtypes import BY_ORT
from suture.core.network.advice import advice, origin
from suture.core.network.description import Network, Refusal
from suture.core.network.parse import ParserDied, ParserProcess, ParserRefused
from suture.core.sessions import NotLoaded, new_session
from suture.core.shadow_copy import runnable
from suture.core.weights import weights_root

ROUNDS, SECONDS = 100, 30
ALIKE = ("FastGelu", "Gelu", "BiasGelu", "QuickGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")  # of
# which the first output has the type of the first input


@dataclass(frozen=True)
class RefusedNode:
    """A node by name and operator, what the parser says, where in the source it comes from, and what helps (if known)."""

    node: str
    operator: str
    message: str
    origin: str | None = None
    advice: str | None = None

    def __str__(self) -> str:
        more = [f"from {self.origin}" if self.origin else "", self.advice or ""]
        return "; ".join(filter(None, [f"{self.operator} {self.node}: {self.message}".strip(), *more]))


def read_network(
    parser: ParserProcess, path: Path, graph: onnx.ModelProto, as_filed: bool = True
) -> tuple[Network | None, list[RefusedNode], bool]:
    """The network, or None and all refusals; and whether those are all (True), or something behind them stays unread.
    `as_filed`: the graph is what stands in the file `path`; else it is read in its place, over that file's weights."""
    found: dict[tuple[str, str], RefusedNode] = {}
    left, types, complete, started = graph, None, True, time.monotonic()
    for _ in range(ROUNDS):
        try:
            network = parser.parse(path, None if left is graph and as_filed else left)
            return (network if left is graph else None), list(found.values()), complete
        except ParserRefused as refused:
            refusals = refused.refusals
        except ParserDied as died:
            types = _types(path, graph) if types is None else types
            refusals = [_killer(parser, path, left, types, died)]
        refusals = [_named(refusal, left.graph) for refusal in refusals]
        guessed = _behind_integers(graph, left)
        nodes = {refusal: _outer(left.graph, refusal) for refusal in refusals}
        certain = [
            each
            for each, node in nodes.items()
            if (left is graph if node is None else not guessed & {*node.input, *node.output})
        ]
        complete = complete and len(certain) == len(nodes)
        for refusal in certain:
            found.setdefault((refusal.node, refusal.message), _explained(refusal, _find(left.graph, refusal)))
        types = _types(path, graph) if types is None else types
        cut = [node for node in nodes.values() if node is not None]
        left = _without(left, cut, types) if cut else None
        if left is None or time.monotonic() - started > SECONDS:
            return None, list(found.values()), False
        if not left.graph.node:
            break
    return None, list(found.values()), complete


def _behind_integers(graph: onnx.ModelProto, left: onnx.ModelProto) -> set[str]:
    """Tensors computed from integers that were cut out: a shape that was one is no longer known, and a refusal behind it
    may come of that alone."""
    before = {value.name for value in graph.graph.input}
    integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    new = [value for value in left.graph.input if value.name not in before]
    behind = {value.name for value in new if value.type.tensor_type.elem_type in integers}
    for node in left.graph.node:
        if behind & set(node.input):
            behind |= set(node.output)
    return behind


def _killer(parser: ParserProcess, path: Path, model: onnx.ModelProto, types: dict, died: ParserDied) -> Refusal:
    """The node of which the parser's process dies: the last of the shortest beginning of the graph that kills it."""
    alive, dead = 0, len(model.graph.node)
    while dead - alive > 1:
        middle = (alive + dead) // 2
        part = onnx.ModelProto()
        part.CopyFrom(model)
        del part.graph.node[middle:], part.graph.output[:]
        part.graph.output.extend(types[name] for name in model.graph.node[middle - 1].output if name in types)
        try:
            parser.parse(path, part)
            alive = middle
        except ParserDied:
            dead = middle
        except ParserRefused:
            alive = middle
    node = model.graph.node[dead - 1]
    return Refusal(node.name or f"node_of_{node.output[0]}", node.op_type, died.parts[1], stopped=True)


def _explained(refusal: Refusal, node: onnx.NodeProto | None) -> RefusedNode:
    message = re.sub(r'^\(?[\w>.:() =!&|-]*&& "(.*)"\)?$', r"\1", refusal.message)
    operator = refusal.operator or (node.op_type if node is not None else "graph")
    name = "as a whole" if refusal.node == "node -1" else refusal.node
    return RefusedNode(name, operator, message, origin(node), advice(node, operator, refusal.message))


def _named(refusal: Refusal, graph: onnx.GraphProto) -> Refusal:
    """Of a node without a name, which the parser gives as its place in the graph, the name that it has elsewhere."""
    number = re.fullmatch(r"node (\d+)", refusal.node)
    node = graph.node[int(number[1])] if number and int(number[1]) < len(graph.node) else None
    if node is None or node.op_type != refusal.operator:
        return refusal
    return replace(refusal, node=node.name or f"node_of_{node.output[0]}")


def _find(graph: onnx.GraphProto, refusal: Refusal) -> onnx.NodeProto | None:
    for node in graph.node:
        if _is(node, refusal):
            return node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH and (inner := _find(attribute.g, refusal)) is not None:
                return inner
    return None


def _outer(graph: onnx.GraphProto, refusal: Refusal) -> onnx.NodeProto | None:
    """The refused node, or the one in whose branch or body it is."""
    for node in graph.node:
        graphs = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
        if _is(node, refusal) or any(_find(inner, refusal) is not None for inner in graphs):
            return node
    return None


def _is(node: onnx.NodeProto, refusal: Refusal) -> bool:
    names = {node.name or None, *(f"node_of_{output}" for output in node.output[:1])}
    return refusal.node in names and refusal.operator in ("", node.op_type)


def _without(model: onnx.ModelProto, cut: list[onnx.NodeProto], types: dict) -> onnx.ModelProto | None:
    """The model with these nodes' outputs as inputs; without any node where nothing is left. None where an output's type is
    unknown."""
    gone = {output for node in cut for output in node.output if output}
    read = {name for node in model.graph.node for name in node.input}
    needed = [name for name in gone if name in read]
    if any(name not in types for name in needed):
        return None
    left = onnx.ModelProto()
    left.CopyFrom(model)
    del left.graph.node[:], left.graph.output[:]
    left.graph.node.extend(node for node in model.graph.node if not gone & set(node.output))
    left.graph.output.extend(value for value in model.graph.output if value.name not in gone)
    if not left.graph.output:  # what nobody reads takes their place
        read = {name for node in left.graph.node for name in node.input}
        ends = [name for node in left.graph.node for name in node.output if name in types and name not in read]
        left.graph.output.extend(types[name] for name in ends)
    if not left.graph.output:
        del left.graph.node[:]
    left.graph.input.extend(types[name] for name in needed)
    return left


def _types(path: Path, model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Types of tensors: what the file says, what onnx infers, and, for operators that it does not know, onnxruntime."""
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    with contextlib.suppress(Exception):  # operators that onnx does not know, or a file too large for one message
        known |= {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    names = [name for node in model.graph.node for name in node.output if name and name not in known]
    if not names:
        return known
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        outputs = new_session(runnable(wide), weights_root(path), mapped=True).get_outputs()
    except NotLoaded:
        outputs = []
    for output in outputs:
        if output.type in BY_ORT and output.name not in known:
            element = BY_ORT[output.type].onnx
            known[output.name] = onnx.helper.make_tensor_value_info(output.name, element, output.shape)
    for node in model.graph.node:
        like = known.get(node.input[0]) if node.op_type in ALIKE and node.input else None
        if like is not None and node.output[0] not in known:
            known[node.output[0]] = onnx.ValueInfoProto(name=node.output[0], type=like.type)
    return known
