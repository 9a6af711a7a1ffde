"""Of a graph too large to be run at once: its first layers, as many as there are kinds of them, with their real weights.

Of tables that are looked up, such as that of the embeddings, the first rows stay: tokens and positions are drawn below that.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import onnx

from suture.core.cpm_inputs import set_places
from suture.core.layerwise import SLOTS
from suture.core.proof.subject import Subject
from suture.core.signature import Signature
from suture.core.tensors import external, tensor_bytes

ROWS = 64  # of a table


def excerpt(
    subjects: Mapping[str, Subject], portable: Subject
) -> tuple[dict[str, onnx.ModelProto], dict[str, Signature], str] | None:
    """The graphs, their signatures, and what they lack, in words. None where no caches tell the layers apart."""
    if portable.signature.caches == () or any(not each.signature.caches for each in subjects.values()):
        return None
    count = portable.signature.layers
    kept = _layers_of_all_kinds(portable.model, portable.signature)
    models, signatures = {}, {}
    for name, subject in subjects.items():
        models[name], signatures[name] = _first_layers(subject.model, subject.signature, kept)
    layers = f"layers {kept} to {count} of {count}" if kept < count else f"the rest of layer {count}"
    behind = f"{layers}, the last norm and the logits (too large; --verify-all runs all)"
    return models, signatures, behind


def _layers_of_all_kinds(model: onnx.ModelProto, signature: Signature) -> int:
    """How many layers' caches are asked for: the last one's depend on all kinds of layers that there are."""
    producers = {name: node for node in model.graph.node for name in node.output}
    seen: set[str] = set()
    kinds = []
    for layer in range(signature.layers):
        before = set(seen)
        for cache in signature.caches:
            if cache.layer == layer:
                _collect(cache.present, producers, seen)
        nodes = {producers[name].output[0]: producers[name] for name in seen - before if name in producers}
        kinds.append(frozenset(Counter(_kind(node) for node in nodes.values()).items()))
    behind = kinds[1:]  # the first has what comes before all layers, and no more of its own than its caches
    first = {kind: index for index, kind in reversed(list(enumerate(behind)))}
    return min(2 + max(first.values(), default=0), signature.layers)


def _kind(node: onnx.NodeProto) -> tuple:
    return node.op_type, *sorted(attribute.SerializeToString() for attribute in node.attribute)


def _collect(end: str | None, producers: dict[str, onnx.NodeProto], seen: set[str]) -> None:
    waiting = [end] if end else []
    while waiting:
        name = waiting.pop()
        if name and name not in seen:
            seen.add(name)
            if name in producers:
                waiting += _reads(producers[name])


def _first_layers(model: onnx.ModelProto, signature: Signature, count: int) -> tuple[onnx.ModelProto, Signature]:
    """With the caches of the first `count` layers alone, of at most SLOTS slots where they are static."""
    caches = tuple(cache for cache in signature.caches if cache.layer < count)
    capacity = None if signature.capacity is None else min(signature.capacity, SLOTS)
    producers = {name: node for node in model.graph.node for name in node.output}
    seen: set[str] = set()
    for cache in caches:
        _collect(cache.present, producers, seen)
    part = onnx.ModelProto()
    part.CopyFrom(model)
    graph = part.graph
    ends = {cache.present for cache in caches}
    names = ends | {cache.past for cache in caches}
    for field, kept in (
        (graph.node, [node for node in model.graph.node if seen & set(node.output)]),
        (graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in seen]),
        (graph.input, [value for value in model.graph.input if value.name in seen]),
        (graph.output, [value for value in model.graph.output if value.name in ends]),
    ):
        del field[:]
        field.extend(kept)
    del graph.value_info[:]
    for tensor, place in external(graph.initializer):
        readers = [node for node in graph.node if tensor.name in node.input]
        if tensor.dims and tensor.dims[0] > ROWS and all(_looks_up(node, tensor.name) for node in readers):
            length = tensor_bytes(tensor) // tensor.dims[0] * ROWS
            tensor.dims[0] = ROWS
            tensor.ClearField("external_data")
            for key, value in {**place, "length": length}.items():
                tensor.external_data.add(key=key, value=str(value))
    if capacity is not None:
        set_places(graph.input, capacity)
    for value in (*graph.input, *graph.output):
        if capacity is not None and value.name in names:
            value.type.tensor_type.shape.dim[2].dim_value = capacity
    tokens = min(signature.vocabulary or ROWS, ROWS)  # whose rows are left
    return part, replace(signature, caches=caches, capacity=capacity, logits=None, vocabulary=tokens)


def _looks_up(node: onnx.NodeProto, table: str) -> bool:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return node.op_type == "Gather" and axis == 0 and node.input[0] == table and node.input[1] != table


def _reads(node: onnx.NodeProto) -> list[str]:
    names = list(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            names += [name for inner in attribute.g.node for name in _reads(inner)]
    return names
