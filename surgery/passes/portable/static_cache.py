"""A cache that grows by Concat becomes one of fixed capacity, written in place, and attention reads its valid part.

    present = concat(past, new)             →  present = TensorScatter(past, new, write_indices)
    Attention(query, keys, values, mask)    →  Attention(query, keys, values, nonpad_kv_seqlen, is_causal)
    past length + i, cumsum(mask) - 1       →  write_indices + i, where they are positions

Token i of a step lies in slot write_indices + i and sees the slots up to its own, so nonpad_kv_seqlen is
write_indices + S for every row: onnxruntime aligns causality to the last row, padding included. Causal masks go, with or
without padding: sequences of a static cache are padded on the right, where nothing attends to it. A causal mask with a
window, or with ALiBi's slopes, is made anew over the slots, and so is one between the products of attention with a sink; a mask
that is a graph input stays, over the slots. All caches of a graph change together, or none does. A cache has no more slots than
the model knows positions.

Where a step's tokens see each other and a bias by distance is added, the bias stays, over the slots; hidden are those from
write_indices + sequence_lengths on, since what a step is padded with would be seen, too:

    where(mask, bias, -large)           →  where(slot < write_indices + sequence_lengths, bias, -large)
    cumsum(mask) - 1, in the bias       →  slot
"""

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from suture.core.signature import WRITE_INDICES, Cache
from suture.surgery.graph import (
    Graph,
    NoMatch,
    consumers,
    input_of,
    inputs_of,
    need,
    onnx_type,
    op_of,
    rank,
    set_inputs,
    static_dim,
    through,
)
from suture.surgery.masks.mask_builders import all_slots, causal_bias, own_slots, step_bias
from suture.surgery.masks.masks import Mask, recognise
from suture.surgery.masks.position_ids import Positions, find_positions, known_positions
from suture.surgery.passes.portable.attention_sinks import place_of_mask
from suture.surgery.rows import of_tokens

# of an Attention over rank 4 with a mask of its own
MASKED_ATTENTION = ("Q", "K", "V", "attn_mask", "scale", "softcap", "softmax_precision", "qk_matmul_output_mode")
INPUT = "a graph input"  # a mask that says for itself what is hidden


@dataclass
class Growing:
    """One cache input with the node that grows it and the nodes that mask attention over the result, with what masks them:
    Attention itself, or, of attention with a sink, the Add of the mask."""

    cache: Cache
    past: gs.Variable
    concat: gs.Node
    attentions: list[tuple[gs.Node, Mask | str]]


def run(graph: Graph, capacity: int) -> int:
    growing: list[Growing] = []
    masks: dict[int, Mask | str] = {}
    if graph.signature.static and graph.signature.capacity != capacity:
        graph.notes.append(f"the cache keeps its {graph.signature.capacity:,} slots (suture.surgery.capacity changes them)")
    if graph.signature.static or not graph.signature.caches:
        _say_stacked(graph)
        return 0

    def find(graph: Graph, concat: gs.Node) -> bool:
        found = _growing(graph, concat, masks)
        growing.extend(found)
        return bool(found)

    graph.match(find, graph.nodes("Concat"))
    missing = [cache.past for cache in graph.signature.caches if cache.past not in {g.cache.past for g in growing}]
    if missing:
        readers = [node for name in missing for node in graph.input(name).outputs[:1]]
        return graph.match(_refuse, [node for node in readers if not node.domain])  # others have said why they stay
    attentions = {id(node): node for each in growing for node, kind in each.attentions if kind is not INPUT}.values()
    steps = of_tokens(graph, [_rows(node) for node in attentions])
    if graph.match(lambda graph, node: _has_rows(node, steps), attentions) < len(attentions):
        return 0
    positions: list[Positions] = []
    logits = next(output for output in graph.gs.outputs if output.inputs).inputs[0]
    if not graph.match(lambda graph, node: _free_of_lengths(graph, growing, positions), [logits]):
        return 0
    known, where = known_positions(graph, capacity) or (capacity, "")
    if known < capacity:
        graph.notes.append(f"the cache has {known:,} slots, not {capacity:,}: {where} knows no more positions")
    _make_static(graph, growing, positions, min(known, capacity))
    return len(growing)


def _say_stacked(graph: Graph) -> None:
    """Of pasts [2, B, heads, P, D], which old exporters of GPT-2 and onnxruntime's Attention have."""
    stacked = [each.name for each in graph.gs.inputs if rank(each) == 5 and static_dim(each, 0) == 2]
    if stacked and not graph.signature.caches:
        more = f" and {len(stacked) - 1} more" if len(stacked) > 1 else ""
        graph.notes.append(
            f"{stacked[0]}{more}, keys and values in one stack, grows as it comes: only caches apart become static"
        )


def _has_rows(attention: gs.Node, steps: set[int]) -> bool:
    need(id(_rows(attention)) in steps, "the rows of its query cannot be shown to be the step's tokens")
    return True


def _rows(attention: gs.Node) -> gs.Tensor:
    """What has a row for each of the step's tokens: the query, or the scores."""
    return attention.inputs[0]


def _mask(attention: gs.Node) -> gs.Tensor | None:
    return input_of(attention, "attn_mask") if op_of(attention) == "Attention" else attention.inputs[1]


def _set_mask(attention: gs.Node, mask: gs.Tensor) -> None:
    if op_of(attention) == "Attention":
        set_inputs(attention, attn_mask=mask)
    else:
        attention.inputs = [attention.inputs[0], mask]


def _refuse(graph: Graph, consumer: gs.Node) -> bool:
    raise NoMatch("this cache is not one Concat away from a causal Attention, so no cache of the graph became static")


def _growing(graph: Graph, concat: gs.Node, masks: dict[int, Mask | str]) -> list[Growing]:
    """The cache that `concat` grows, if nothing but a causal mask would miss the growing; else nothing, or a near miss."""
    caches = {cache.past: cache for cache in graph.signature.caches}
    past = concat.inputs[0]
    if past.name not in caches or not any(past is tensor for tensor in graph.gs.inputs):
        return []
    need(len(concat.inputs) == 2, f"{len(concat.inputs)} tensors are joined to the cache at once")
    need(concat.attrs["axis"] in (2, -2), f"the cache grows along axis {concat.attrs['axis']}, not 2")
    present = concat.outputs[0]
    wanted = caches[past.name].present
    window = any(output.name == wanted for node in consumers(present, "Slice") for output in node.outputs)
    need(not window, f"the output {wanted} is a window of the grown cache: its slots move")
    need(present.name == wanted, f"the grown cache is not the output {wanted}")
    for axis in (1, 3):
        joined, cached = static_dim(concat.inputs[1], axis), static_dim(past, axis)
        need(
            None in (joined, cached) or joined == cached,
            f"what is joined to the cache has {joined} on axis {axis}, the cache {cached}",
        )
    others = [node.op for node in past.outputs if node is not concat and op_of(node) != "Shape"]
    need(not others, f"the cache is also read by {', '.join(others)}")
    written = {id(node): place for node in present.outputs if (place := place_of_mask(graph, node)) is not None}
    attentions = [*consumers(present, "Attention"), *written.values()]
    others = [node.op for node in present.outputs if op_of(node) not in ("Attention", "Shape") and id(node) not in written]
    need(
        attentions and not others,
        f"the grown cache is read by {', '.join(others) or 'nothing'}, not by Attention alone",
    )
    masked = []
    for attention in attentions:
        if op_of(attention) == "Attention":
            own = inputs_of(attention, "past_key", "past_value", "nonpad_kv_seqlen")
            need(all(each is None for each in own), "the Attention has a cache of its own")
            need(not attention.attrs.get("is_causal"), "the Attention is causal by itself, counted from the first slot")
            graph.need_known(attention, *MASKED_ATTENTION)
        mask = _mask(attention)
        need(mask is not None, "attention over the cache is not masked, so it is not causal")
        if id(mask) not in masks:
            over_slots = rank(mask) == 4 and any(mask is tensor for tensor in graph.gs.inputs)
            masks[id(mask)] = INPUT if over_slots else recognise(graph, mask)
        kind = masks[id(mask)]
        need(kind is INPUT or isinstance(kind, Mask), kind)
        understood = kind is INPUT or kind.causal or kind.bias is not None
        need(understood, f"the mask is {kind if kind is INPUT else kind.kind.value}, not causal")
        masked.append((attention, kind))
    return [Growing(caches[past.name], past, concat, masked)]


def _free_of_lengths(graph: Graph, growing: list[Growing], positions: list[Positions]) -> bool:
    """Whether nothing but masks and positions depends on how long the cache is; appends these positions."""
    attentions = [(attention, kind) for each in growing for attention, kind in each.attentions if kind is not INPUT]
    masked = {id(attention): kind.bias for attention, kind in attentions}
    readers = _length_readers(graph, growing)
    live = _live(graph, masked, set())
    if any(id(node) in live for node in readers):
        positions += find_positions(graph, readers, live)
        if any(bias is not None for bias in masked.values()):
            positions += find_positions(graph, readers, live, of_slots=True)
    cut = {(id(node), id(each.tensor)) for each in positions for node in each.consumers}
    live = _live(graph, masked, cut)
    for node in readers:
        need(id(node) not in live, f"how long the cache is, or its mask, is used elsewhere than in masks, by {node.name}")
    return True


def _length_readers(graph: Graph, growing: list[Growing]) -> list[gs.Node]:
    """Nodes that read the attention mask, or the length of a cache."""
    tensors = [tensor for each in growing for tensor in (each.past, each.concat.outputs[0])]
    nodes = [node for tensor in tensors for node in consumers(tensor, "Shape")]
    mask = next((tensor for tensor in graph.gs.inputs if tensor.name == graph.signature.mask), None)
    nodes += mask.outputs if mask is not None and rank(mask) == 2 else []
    return [node for node in nodes if node.op != "Shape" or node.attrs.get("start", 0) != 0 or node.attrs.get("end") != 1]


def _live(graph: Graph, masked: dict[int, gs.Tensor | None], cut: set[tuple[int, int]]) -> set[int]:
    """The ids of the nodes that still count once these Attention nodes have no mask but a bias, where there is one, and
    nodes miss the inputs `cut`."""
    live: set[int] = set()
    stack = [node for output in graph.gs.outputs for node in output.inputs]
    while stack:
        node = stack.pop()
        if id(node) in live:
            continue
        live.add(id(node))
        inputs = node.inputs
        if id(node) in masked:
            bias, mask = masked[id(node)], _mask(node)
            inputs = [*(tensor for tensor in node.inputs if tensor is not mask), *([] if bias is None else [bias])]
        stack += [above for tensor in inputs if (id(node), id(tensor)) not in cut for above in tensor.inputs]
    return live


def _make_static(graph: Graph, growing: list[Growing], positions: list[Positions], capacity: int) -> None:
    write_indices = gs.Variable(WRITE_INDICES, np.int64, ["batch"])
    graph.gs.inputs.append(write_indices)
    for each in positions:
        _count_from(graph, each, write_indices, growing[0].past)
    for each in growing:
        present, new = each.concat.outputs[0], each.concat.inputs[1]
        batch, kv_heads, _, head_dim = each.past.shape
        kv_heads, head_dim = static_dim(new, 1) or kv_heads, static_dim(new, 3) or head_dim  # some leave their inputs' open
        each.past.shape = [batch, kv_heads, capacity, head_dim]
        graph.replace(present, "TensorScatter", [each.past, new, write_indices], {"axis": -2, "mode": "linear"})
        present.shape = list(each.past.shape)
    for name in graph.signature.placed:
        graph.input(name).shape = ["batch", capacity]
    valid = _valid_slots(graph, write_indices)
    made: dict[tuple, gs.Tensor] = {}
    attentions = {id(node): (node, kind) for each in growing for node, kind in each.attentions}
    for attention, kind in attentions.values():
        if kind is INPUT:
            mask = _mask(attention)
            mask.shape = [*mask.shape[:3], capacity]
        elif kind.bias is not None:
            dtype = onnx_type(_rows(attention))
            key = (id(kind.bias), dtype)
            if key not in made:
                made[key] = _over_slots(graph, kind.bias, write_indices, growing[0].past, dtype)
            _set_mask(attention, made[key])
        elif kind.window is None and kind.slopes is None and op_of(attention) == "Attention":
            set_inputs(attention, attn_mask=None, nonpad_kv_seqlen=valid)
            attention.attrs["is_causal"] = 1
        else:
            key = (kind.window, kind.slopes, onnx_type(_rows(attention)))
            if key not in made:
                made[key] = causal_bias(graph, write_indices, growing[0].past, key[2], kind.window, kind.slopes)
            _set_mask(attention, made[key])
    graph.signature = replace(graph.signature, write_indices=WRITE_INDICES, capacity=capacity)


def _over_slots(graph: Graph, bias: gs.Tensor, write_indices: gs.Variable, past: gs.Variable, dtype: int) -> gs.Variable:
    """The bias [B, heads, S, L] as `dtype`, hidden where no token is."""
    narrow = through(bias, "Cast")
    added = narrow if onnx_type(narrow) == dtype else bias
    if onnx_type(added) != dtype:
        added = graph.new("Cast", [added], {"to": dtype}, dtype=dtype)
    return step_bias(graph, write_indices, all_slots(graph, past), added, dtype)


def _count_from(graph: Graph, positions: Positions, write_indices: gs.Variable, past: gs.Variable) -> None:
    """Puts write_indices + i, or the slots, in place of positions worked out from lengths or masks."""
    if positions.of_slots:
        slots = graph.new("Unsqueeze", [all_slots(graph, past), graph.int64([0])], name="slots/all")
    else:
        slots = own_slots(graph, write_indices)
    if positions.offset:
        slots = graph.new("Add", [slots, graph.int64(positions.offset)])
    unit_axes = [axis for axis in range(1, rank(positions.tensor)) if axis != positions.axis]
    if unit_axes:
        slots = graph.new("Unsqueeze", [slots, graph.int64(unit_axes)])
    if onnx_type(slots) != onnx_type(positions.tensor):
        slots = graph.new("Cast", [slots], {"to": onnx_type(positions.tensor)}, dtype=onnx_type(positions.tensor))
    for node in positions.consumers:
        node.inputs = [slots if tensor is positions.tensor else tensor for tensor in node.inputs]
    if positions.of_slots:
        _forget_shapes(positions.consumers)


def _forget_shapes(nodes: list[gs.Node]) -> None:
    """Of what is computed from slots, up to attention over them: inferred anew, it is as long as the cache."""
    stack, seen = list(nodes), set()
    while stack:
        node = stack.pop()
        if id(node) in seen or node.op == "Attention":
            continue
        seen.add(id(node))
        for tensor in node.outputs:
            tensor.shape = None
            stack += tensor.outputs


def _valid_slots(graph: Graph, write_indices: gs.Variable) -> gs.Variable:
    """write_indices + S, int64 [B]."""
    tokens = graph.input(graph.signature.tokens)
    steps = graph.new("Shape", [tokens], {"start": 1, "end": 2}, dtype=np.int64, shape=[1])
    return graph.new("Add", [write_indices, steps], name="valid_slots", shape=["batch"])
