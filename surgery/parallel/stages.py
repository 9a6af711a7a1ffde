"""A decoder cut behind some of its layers, for models that fit no single GPU (pipeline parallelism).

stage 0: x → layers 0 to a - 1 → t          stage 1: t → layers a to n - 1 → logits

t is the one tensor through which all that the first layers' caches tell reaches the later layers: the residual stream. What both
need beside it, such as positions and valid slots, each computes from the same inputs.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto, shape_inference

from suture.core.errors import UserError
from suture.core.signature import Signature
from suture.core.subgraphs import subgraphs

OPTION = "--stages"


def cut_at_layers(
    model: ModelProto, signature: Signature, stages: int, known: Mapping[str, ValueInfoProto] | None = None
) -> list[ModelProto]:
    """The graphs of the stages, with as many layers in each as possible. The inputs and outputs keep their names, and what crosses
    is an output of one and an input of the next under the same name. `known`: types of tensors, where the graph has operators that
    onnx does not know. Raises UserError where a cut would be more than one tensor, or
    there are fewer layers than stages."""
    layers = signature.layers if signature.caches else 0
    if layers < stages:
        raise UserError(f"{OPTION} {stages}", f"the graph has {layers} layers with caches", "give at most as many stages")
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    types = {value.name: value for value in (*inferred.graph.value_info, *model.graph.input, *model.graph.output)} | dict(
        known or {}
    )
    bounds = [round(layers * number / stages) for number in range(1, stages)]
    crossing = [_residual(model, signature, bound) for bound in bounds]
    parts = []
    for number, (first, end) in enumerate(zip([0, *bounds], [*bounds, layers])):
        presents = {cache.present for cache in signature.caches if first <= cache.layer < end and cache.present}
        outputs = [value.name for value in model.graph.output if value.name in presents]
        if number == stages - 1:
            ours = {cache.present for cache in signature.caches}
            outputs = [value.name for value in model.graph.output if value.name in presents or value.name not in ours]
        given = crossing[number - 1 : number] if number else []
        made = crossing[number : number + 1]
        parts.append(_between(model, given, [*made, *outputs], types))
        _measure_own_caches(parts[-1], signature, first, end)
    return parts


def _residual(model: ModelProto, signature: Signature, layer: int) -> str:
    """The last tensor that comes of earlier layers' caches, not of this or later ones', and through which all that those tell
    reaches the later ones."""
    nodes = model.graph.node
    pasts = {cache.past for cache in signature.caches if cache.layer < layer}
    early = _below(nodes, pasts)
    late = _below(nodes, {cache.past for cache in signature.caches if cache.layer >= layer})
    ends = {cache.present for cache in signature.caches if cache.layer >= layer} | {signature.logits}
    for node in reversed(nodes):
        for name in node.output:
            if name in early and name not in late and not _below(nodes, pasts, but=name) & ends:
                return name
    raise UserError(OPTION, f"no one tensor leads from layer {layer - 1} to layer {layer}", "leave it out")


def _below(nodes: Iterable[NodeProto], sources: Collection[str], but: str = "") -> set[str | None]:
    """What is computed of these tensors' values, and not of `but`; their shapes are the same in all layers."""
    found: set[str | None] = set(sources)
    for node in nodes:
        if node.op_type != "Shape" and not found.isdisjoint(_reads(node)):
            found |= {name for name in node.output if name and name != but}
    return found


def _between(
    model: ModelProto, given: Collection[str], outputs: Sequence[str], types: Mapping[str, ValueInfoProto]
) -> ModelProto:
    """What computes the outputs of the tensors `given` and of the graph's inputs."""
    graph = model.graph
    wanted, nodes = set(outputs), []
    for node in reversed(graph.node):
        if wanted & set(node.output) and not set(node.output) <= set(given):
            nodes.append(node)
            wanted |= {name for name in _reads(node) if name not in given}
    read = {name for node in nodes for name in _reads(node)}
    part = onnx.ModelProto()
    part.CopyFrom(model)
    for values in (part.graph.node, part.graph.input, part.graph.output, part.graph.initializer, part.graph.value_info):
        del values[:]
    part.graph.node.extend(reversed(nodes))
    part.graph.input.extend(value for value in graph.input if value.name in read)
    part.graph.input.extend(types[name] for name in given)
    part.graph.output.extend(types[name] for name in outputs)
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    return part


def _measure_own_caches(part: ModelProto, signature: Signature, first: int, end: int) -> None:
    """Sizes are read off the part's own caches: all have the same."""
    declared = {value.name: value for value in part.graph.input}
    pasts = {cache.past: cache.layer for cache in signature.caches}
    own = [name for name in declared if first <= pasts.get(name, -1) < end]
    for name, value in declared.items():
        if name in pasts and name not in own:
            alike = next((each for each in own if declared[each].type == value.type), None)
            readers = [node for node in part.graph.node if name in _reads(node)]
            if alike is None or any(node.op_type != "Shape" for node in readers):
                raise UserError(OPTION, f"layers {first} to {end - 1} read {name}", "leave it out")
            for node in readers:
                node.input[0] = alike
    kept = [value for value in part.graph.input if value.name not in pasts or value.name in own]
    del part.graph.input[:]
    part.graph.input.extend(kept)


def _reads(node: NodeProto) -> set[str]:
    """What it and the graphs inside it take."""
    return {name for name in node.input if name} | {
        name for inner in subgraphs(node) for each in inner.node for name in _reads(each)
    }
