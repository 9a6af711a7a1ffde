"""A cache that grows by Concat becomes one of fixed capacity, written in place, and attention reads its valid part.

    present = concat(past, new)             →  present = TensorScatter(past, new, write_indices)
    Attention(query, keys, values, mask)    →  Attention(query, keys, values, nonpad_kv_seqlen, is_causal)

Token i of a step lies in slot write_indices + i and sees the slots up to its own, so nonpad_kv_seqlen is
write_indices + S for every row: onnxruntime aligns causality to the last row, padding included. Causal masks go, with or
without padding: sequences of a static cache are padded on the right, where nothing attends to it. All caches of a graph
change together, or none does.
"""

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from contracts.signature import WRITE_INDICES, Cache
from surgery.graph import Graph, NoMatch, consumers, need
from surgery.masks import Mask, recognise

MEANS_STATIC = (Mask.CAUSAL, Mask.CAUSAL_PADDED)


@dataclass
class Growing:
    """One cache input with the Concat that grows it and the attention nodes that read the result."""

    cache: Cache
    past: gs.Variable
    concat: gs.Node
    attentions: list[gs.Node]


def run(graph: Graph, capacity: int) -> int:
    growing: list[Growing] = []
    masks: dict[int, Mask | str] = {}
    live = _live_without_masks(graph)

    def find(graph: Graph, concat: gs.Node) -> bool:
        found = _growing(graph, concat, masks, live)
        growing.extend(found)
        return bool(found)

    graph.match(find, graph.nodes("Concat"))
    missing = [cache.past for cache in graph.signature.caches if cache.past not in {g.cache.past for g in growing}]
    if missing:
        return 0 if graph.signature.static else graph.match(_refuse, [graph.input(name).outputs[0] for name in missing])
    write_indices = gs.Variable(WRITE_INDICES, np.int64, ["batch"])
    graph.gs.inputs.append(write_indices)
    valid = _valid_slots(graph, write_indices)
    for found in growing:
        found.past.shape = [*found.past.shape[:2], capacity, found.past.shape[3]]
        present, new = found.concat.outputs[0], found.concat.inputs[1]
        attrs = {"axis": -2, "mode": "linear"}
        graph.replace(present, "TensorScatter", [found.past, new, write_indices], attrs)
        present.shape = list(found.past.shape)
    for attention in {id(node): node for found in growing for node in found.attentions}.values():
        attention.inputs = [*attention.inputs[:3], *(gs.Variable.empty() for _ in range(3)), valid]
        attention.attrs["is_causal"] = 1
    graph.signature = replace(graph.signature, write_indices=WRITE_INDICES, capacity=capacity)
    return len(growing)


def _refuse(graph: Graph, consumer: gs.Node) -> bool:
    raise NoMatch("this cache is not one Concat away from a causal Attention, so no cache of the graph became static")


def _growing(graph: Graph, concat: gs.Node, masks: dict[int, Mask | str], live: set[int]) -> list[Growing]:
    """The cache that `concat` grows, if nothing but a causal mask would miss the growing; else nothing, or a near miss."""
    caches = {cache.past: cache for cache in graph.signature.caches}
    past = concat.inputs[0]
    if past.name not in caches or not any(past is tensor for tensor in graph.gs.inputs):
        return []
    need(len(concat.inputs) == 2, f"{len(concat.inputs)} tensors are joined to the cache at once")
    need(concat.attrs["axis"] in (2, -2), f"the cache grows along axis {concat.attrs['axis']}, not 2")
    present = concat.outputs[0]
    need(present.name == caches[past.name].present, f"the grown cache is not the output {caches[past.name].present}")
    others = [node.op for node in past.outputs if node is not concat and node.op != "Shape"]
    need(not others, f"the cache is also read by {', '.join(others)}")
    for node in [*consumers(past, "Shape"), *consumers(present, "Shape")]:
        lengths = id(node) in live and not _reads_batch_alone(node)
        need(not lengths, f"the cache's length is used elsewhere than in masks, by {node.name}")
    attentions = consumers(present, "Attention")
    others = [node.op for node in present.outputs if node.op not in ("Attention", "Shape")]
    need(
        attentions and not others,
        f"the grown cache is read by {', '.join(others) or 'nothing'}, not by Attention alone",
    )
    for attention in attentions:
        mask = attention.inputs[3] if len(attention.inputs) > 3 else None
        need(mask is not None, "attention over the cache is not masked, so it is not causal")
        if id(mask) not in masks:
            masks[id(mask)] = recognise(graph, mask)
        kind = masks[id(mask)]
        need(kind in MEANS_STATIC, kind if isinstance(kind, str) else f"the mask is {kind.value}, not causal")
    return [Growing(caches[past.name], past, concat, attentions)]


def _valid_slots(graph: Graph, write_indices: gs.Variable) -> gs.Variable:
    """write_indices + S, int64 [B]."""
    tokens = graph.input(graph.signature.tokens)
    steps = graph.new("Shape", [tokens], {"start": 1, "end": 2}, dtype=np.int64, shape=[1])
    return graph.new("Add", [write_indices, steps], name="valid_slots", shape=["batch"])


def _live_without_masks(graph: Graph) -> set[int]:
    """The ids of the nodes that still count once no Attention has a mask."""
    live: set[int] = set()
    stack = [node for output in graph.gs.outputs for node in output.inputs]
    while stack:
        node = stack.pop()
        if id(node) in live:
            continue
        live.add(id(node))
        inputs = node.inputs[:3] if node.op == "Attention" else node.inputs
        stack += [above for tensor in inputs for above in tensor.inputs]
    return live


def _reads_batch_alone(shape: gs.Node) -> bool:
    return shape.attrs.get("start", 0) == 0 and shape.attrs.get("end") == 1
