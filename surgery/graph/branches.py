"""A decoder inside one If (decoder_model_merged.onnx has the one with a past and the one without): one branch, taken out.

outputs = If(use_cache_branch){then: ..., else: ...}  →  the branch's own nodes, under the If's output names
"""

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper

from suture.core.cache_flow import grown
from suture.core.errors import UserError
from suture.core.subgraphs import reads

BRANCHES = ("then", "else", "past")


def take(model: ModelProto, where: object, branch: str | None) -> list[str]:
    """Puts the branch `branch` (BRANCHES; "past": the one that reads a cache) in the place of the If that all outputs come
    from. Returns what to tell. Raises UserError where there is such an If, one of whose branches reads a cache, and none is
    chosen; or the reverse."""
    found = _whole(model.graph)
    if found is None or (branch is None and not _is_decoder(model.graph, found)):
        if branch is not None:
            raise UserError(f"--branch {branch}", "the outputs do not all come from one If", "leave it out")
        return []
    bodies = {attribute.name.removesuffix("_branch"): attribute.g for attribute in found.attribute}
    if branch is None:
        what = f"all outputs come from one If, {found.name or found.output[0]}, in which there are two graphs"
        raise UserError(where, what, "take one out with --branch then, else or past (the one that reads a cache)")
    chosen = _with_past(model.graph, found, bodies, where) if branch == "past" else branch
    _inline(model.graph, found, bodies[chosen])
    return [f"of the If {found.name or found.output[0]} the branch {chosen} was taken; its condition is not an input any more"]


def _whole(graph: GraphProto) -> NodeProto | None:
    outputs = {value.name for value in graph.output}
    return next((node for node in graph.node if node.op_type == "If" and outputs <= set(node.output)), None)


def _is_decoder(graph: GraphProto, found: NodeProto) -> bool:
    """Whether a branch reads a cache, which passes do not see inside an If, and which of them runs is not known: of others
    TensorRT makes a condition."""
    if _is_constant(graph, found.input[0]):
        return False
    return any(_growing(graph, attribute.g) for attribute in found.attribute)


def _growing(graph: GraphProto, body: GraphProto) -> int:
    """How many caches grow in the branch."""
    trial = GraphProto()
    trial.CopyFrom(graph)
    _inline(trial, _whole(trial), body)
    return len(grown(trial))


def _is_constant(graph: GraphProto, name: str) -> bool:
    """Whether a pass will put one branch in the If's place."""
    given = {value.name for value in graph.input}
    constants = {tensor.name for tensor in graph.initializer} - given
    return name in constants or any(node.op_type == "Constant" and name in node.output for node in graph.node)


def _with_past(graph: GraphProto, found: NodeProto, bodies: dict[str, GraphProto], where: object) -> str:
    growing = {name: _growing(graph, body) for name, body in bodies.items()}
    best = max(growing, key=growing.get)
    if not growing[best] or sum(count == growing[best] for count in growing.values()) > 1:
        raise UserError(where, f"of the If {found.name} not one branch reads a cache", "choose then or else")
    return best


def _inline(graph: GraphProto, found: NodeProto, body: GraphProto) -> None:
    """The body's nodes and weights in the If's place, its outputs under the If's names; what nothing reads goes, and so
    does the condition's input."""
    copy = GraphProto()
    copy.CopyFrom(body)
    names = {inner.name: outer for inner, outer in zip(copy.output, found.output)}
    made = {name for node in copy.node for name in node.output} | {tensor.name for tensor in copy.initializer}
    nodes = list(copy.node)
    for inner, outer in zip(copy.output, found.output):
        if inner.name not in made or sum(each.name == inner.name for each in copy.output) > 1:
            nodes.append(helper.make_node("Identity", [inner.name], [outer]))  # what comes from outside, or goes out twice
            names.pop(inner.name, None)
    for node in nodes:
        _rename(node, names)
    for tensor in copy.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    place = next(index for index, node in enumerate(graph.node) if node.output == found.output)
    kept = [*list(graph.node)[:place], *nodes, *list(graph.node)[place + 1 :]]
    condition = found.input[0]
    kept = [NodeProto.FromString(node.SerializeToString()) for node in kept]
    kept = _live(kept, [value.name for value in graph.output])
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(copy.initializer)
    read = {name for node in kept for name in reads(node)}
    weights = [tensor for tensor in graph.initializer if tensor.name in read]
    weights = [
        onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in {each.name: each for each in weights}.values()
    ]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    inputs = [value for value in graph.input if value.name != condition or value.name in read]
    inputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in inputs]
    del graph.input[:], graph.value_info[:]
    graph.input.extend(inputs)


def _live(nodes: list[NodeProto], outputs: list[str]) -> list[NodeProto]:
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= reads(node)
    return kept[::-1]


def _rename(node: NodeProto, names: dict[str, str]) -> None:
    for side in (node.input, node.output):
        side[:] = [names.get(name, name) for name in side]
    for attribute in node.attribute:
        for inner in [*([attribute.g] if attribute.type == AttributeProto.GRAPH else []), *attribute.graphs]:
            for each in inner.node:
                _rename(each, names)
            for value in inner.output:
                value.name = names.get(value.name, value.name)
