"""A cache of fixed size that a scatter writes becomes one that grows, which static_cache then writes in place.

    present = scatter(past [B, kv_heads, L, head_dim], first + i, new)  →  present = concat(past, new)
    Attention(query, present, present, mask)                            →  the same, mask: slot <= past length + i, or the
                                                                           input [B, 1, S, L] that it is, over the slots
    first, or first + i, as an input of the graph                       →  past length, past length + i

Which scatter it is, and between which transpositions, is not looked at: the part of the graph between past, new and the
inputs that say where is run, and must put new into the slots first + i and leave the others. All caches change, or none.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from suture.core.additive_mask import FAR_BELOW
from suture.core.signature import Cache
from suture.core.step_inputs import step_values
from suture.surgery.graph import (
    Graph,
    NoMatch,
    input_of,
    need,
    onnx_type,
    op_of,
    producer,
    rank,
    set_inputs,
    static_dim,
    through,
)
from suture.surgery.masks.mask_probe import evaluate
from suture.surgery.masks.masks import BOOL
from suture.surgery.passes.portable.own_cache import causal
from suture.surgery.passes.portable.static_cache import MASKED_ATTENTION
from suture.surgery.rows import of_tokens

STEPS = ((2, 3, 4), (1, 1, 5), (3, 4, 0))  # rows, tokens, slots that are full
INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


@dataclass
class Scattered:
    cache: Cache
    past: gs.Variable
    update: gs.Variable
    perm: tuple[int, ...]  # of the update, to [B, kv_heads, S, head_dim]
    present: gs.Variable


def run(graph: Graph) -> int:
    signature = graph.signature
    if signature.static or not signature.caches:
        return 0
    found: list[Scattered] = []

    def find(graph: Graph, node: gs.Node) -> bool:
        scattered = _scattered(graph, node)
        found.extend([scattered] if scattered else [])
        return bool(scattered)

    presents = {cache.present for cache in signature.caches}
    graph.match(find, [output.inputs[0] for output in graph.gs.outputs if output.name in presents and output.inputs])
    if len(found) < len(signature.caches):
        return 0
    keys = {id(each.present) for each in found}
    attentions = [node for node in graph.nodes("Attention") if id(input_of(node, "K")) in keys]
    known = {id(node) for node in attentions}
    others = [node for each in found for node in each.present.outputs if id(node) not in known and op_of(node) != "Shape"]
    if others:
        graph.match(_refuse, others)
        return 0
    steps = of_tokens(graph, [input_of(node, "Q") for node in attentions])
    if graph.match(lambda graph, node: _is_causal(graph, node, found[0].past, steps), attentions) < len(attentions):
        return 0
    _grow(graph, found, attentions)
    return len(found)


def _scattered(graph: Graph, last: gs.Node) -> Scattered | None:
    """The cache that ends at `last`, None if no scatter writes it."""
    scatter = producer(through(last.outputs[0], "Transpose", "Identity"), "ScatterND", "ScatterElements")
    if scatter is None:
        return None
    present = last.outputs[0]
    cache = next(cache for cache in graph.signature.caches if cache.present == present.name)
    past, update = graph.input(cache.past), scatter.inputs[2]
    _, heads, slots, head_dim = (static_dim(past, axis) for axis in range(4))
    need(heads and slots and head_dim and rank(update) == 4, "the size of the cache, or of its update, is not known")
    for perm in permutations(range(4)):
        sizes = static_dim(update, perm[1]), static_dim(update, perm[3])
        if sizes == (heads, head_dim) and all(_writes(graph, past, update, perm, present, step) for step in _steps(graph)):
            return Scattered(cache, past, update, perm, present)
    raise NoMatch("the scatter does not write the step's tokens one slot after the other, all rows alike")


def _steps(graph: Graph) -> list[tuple[int, int, int]]:
    """Of as many rows and tokens as the graph takes, where these are fixed."""
    taken = graph.input(graph.signature.tokens)
    rows, tokens = static_dim(taken, 0), static_dim(taken, 1)
    return [(rows or most, tokens or count, full) for most, count, full in STEPS]


def _writes(
    graph: Graph,
    past: gs.Variable,
    update: gs.Variable,
    perm: tuple[int, ...],
    present: gs.Variable,
    step: tuple[int, int, int],
) -> bool:
    """Whether `present` is `past` with the update, seen as [B, kv_heads, S, head_dim], in the slots from `full` on."""
    (rows, tokens, full), random = step, np.random.default_rng(0)
    _, heads, slots, head_dim = past.shape
    before = random.normal(size=(rows, heads, slots, head_dim)).astype(_numpy(past))
    new = random.normal(size=(rows, heads, tokens, head_dim)).astype(_numpy(update))
    expected = before.copy()
    expected[:, :, full : full + tokens] = new
    feeds = _feeds(graph, rows, tokens, full, {past.name: before})
    values = evaluate(graph, [present], feeds, {update.name: (update, new.transpose(np.argsort(perm)))})
    return values is not None and np.array_equal(values[0], expected)


def _refuse(graph: Graph, reader: gs.Node) -> bool:
    raise NoMatch("it reads a static cache that a scatter writes, and is not an Attention whose keys are one")


def _is_causal(graph: Graph, attention: gs.Node, past: gs.Variable, steps: set[int]) -> bool:
    need(id(input_of(attention, "Q")) in steps, "the rows of its query cannot be shown to be the step's tokens")
    mask = input_of(attention, "attn_mask")
    graph.need_known(attention, *MASKED_ATTENTION)
    need(mask is not None and len(attention.inputs) == 4, "attention over the static cache is not masked by one mask")
    if _is_given(graph, mask):
        need(static_dim(mask, 3) in (None, static_dim(past, 2)), "the mask that is an input is not one over the cache's slots")
        return True
    for rows, tokens, full in _steps(graph):
        values = evaluate(graph, [mask], _feeds(graph, rows, tokens, full, {}))
        need(values is not None, "the mask over the static cache depends on more than how full it is")
        visible = values[0] if onnx_type(mask) == BOOL else values[0] > FAR_BELOW
        expected = np.arange(static_dim(past, 2)) <= full + np.arange(tokens)[:, None]
        shown = onnx_type(mask) == BOOL or not values[0][visible].any()
        need(shown and visible.shape[-2:] == expected.shape, "the mask over the static cache is not causal")
        need((visible == expected).all(), "the mask over the static cache is not causal")
    return True


def _is_given(graph: Graph, mask: gs.Tensor) -> bool:
    """Whether the mask is an input over slots, which says for itself what is hidden."""
    return rank(mask) == 4 and any(mask is tensor for tensor in graph.gs.inputs)


def _feeds(graph: Graph, rows: int, tokens: int, full: int, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of a step by name: tokens, positions, caches, and the one that says how full the caches are."""
    signature = graph.signature
    positions = full + np.tile(np.arange(tokens), (rows, 1))
    feeds = step_values(signature, np.ones((rows, tokens), np.int64), positions)
    for cache in signature.caches:
        feeds[cache.past] = np.zeros(
            (rows, *(size if isinstance(size, int) else 1 for size in graph.input(cache.past).shape[1:]))
        )
    for tensor in _counters(graph):
        feeds[tensor.name] = np.full(tensor.shape, full) if _is_one(tensor) else full + np.arange(tokens)
    return {name: values.astype(_numpy(graph.input(name))) for name, values in feeds.items()} | known


def _counters(graph: Graph) -> list[gs.Variable]:
    """The inputs of one number, or of one for each token, of which nothing else is known."""
    names = {graph.signature.tokens, graph.signature.positions, graph.signature.mask, graph.signature.sequence_lengths}
    return [each for each in graph.gs.inputs if each.name not in names and onnx_type(each) in INTEGERS and rank(each) in (0, 1)]


def _is_one(counter: gs.Variable) -> bool:
    return rank(counter) == 0 or counter.shape[0] == 1


def _grow(graph: Graph, found: list[Scattered], attentions: list[gs.Node]) -> None:
    for each in found:
        batch, heads, _, head_dim = each.past.shape
        each.past.shape = [batch, heads, "past_sequence", head_dim]
        graph.replace(each.present, "Concat", [each.past, _transposed(graph, each.update, each.perm)], {"axis": 2})
        each.present.shape = [batch, heads, None, head_dim]
    past = found[0].past
    full = graph.new("Shape", [past], {"start": 2, "end": 3}, name="past_length", dtype=np.int64, shape=[1])
    scalar = graph.new("Squeeze", [full], name="past_length", dtype=np.int64, shape=[])
    for counter in _counters(graph):
        if _is_one(counter):
            value = full if rank(counter) else scalar
        else:
            tokens = graph.input(graph.signature.tokens)
            steps = graph.new("Shape", [tokens], {"start": 1, "end": 2}, dtype=np.int64, shape=[1])
            end = graph.new("Add", [scalar, graph.new("Squeeze", [steps], shape=[])], shape=[])
            value = graph.new("Range", [scalar, end, graph.int64(1)], name="slots/step", dtype=np.int64)
        if onnx_type(counter) != onnx.TensorProto.INT64:
            value = graph.new("Cast", [value], {"to": onnx_type(counter)}, dtype=onnx_type(counter), shape=value.shape)
        for node in list(counter.outputs):
            node.inputs = [value if tensor is counter else tensor for tensor in node.inputs]
        graph.gs.inputs.remove(counter)
    given = [(attention, input_of(attention, "attn_mask")) for attention in attentions]
    made = [attention for attention, mask in given if not _is_given(graph, mask)]
    for _, mask in given:
        if _is_given(graph, mask):
            mask.shape = [*mask.shape[:3], None]
    if made:
        query = input_of(made[0], "Q")  # of as many tokens as are written
        mask = causal(graph, query, query, past, None)
        for attention in made:
            set_inputs(attention, attn_mask=mask)


def _transposed(graph: Graph, tensor: gs.Variable, perm: tuple[int, ...]) -> gs.Tensor:
    """The tensor with these axes, in one Transpose with what transposed it before, or none."""
    before = producer(tensor, "Transpose")
    if before is not None:
        tensor, perm = before.inputs[0], tuple(before.attrs.get("perm", [])[axis] for axis in perm)
    if perm == (0, 1, 2, 3):
        return tensor
    shape = None if tensor.shape is None else [tensor.shape[axis] for axis in perm]
    return graph.new("Transpose", [tensor], {"perm": list(perm)}, shape=shape)


def _numpy(tensor: gs.Tensor) -> np.dtype:
    return onnx.helper.tensor_dtype_to_np_dtype(onnx_type(tensor))
