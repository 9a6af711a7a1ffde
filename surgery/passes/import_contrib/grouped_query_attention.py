"""GroupQueryAttention becomes what it does inside: rotary embedding, the growing of the cache, attention.

    GroupQueryAttention(q, k, v, past_k, past_v, seqlens_k, total, cos, sin)  →
        present_k = concat(past_k, RotaryEmbedding(k, cos, sin, position_ids))      present_v = concat(past_v, v)
        Attention(RotaryEmbedding(q, ...), present_k, present_v, mask)
    mask[b, 0, i, j] = attention_mask[b, j] and j <= past + i                       bool [B, 1, S, past + S]

q may hold q, k and v side by side. Norms of query and key heads, where it has them, come before the rotation.

The op itself counts positions from seqlens_k, each row's number of tokens less one. The standard form takes them as an
input, `position_ids` [B, S], which is added where the graph has none and something rotates: the number of the row's tokens
before this one. seqlens_k has to be what genai's graphs compute, sum(attention_mask) - 1; where seqlens_k and total are
inputs themselves, attention_mask takes their place. A row shorter than others keeps its new tokens where Concat puts
them, behind its padding, which the mask hides; the op would have put them right behind its own.
"""

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from suture.core.signature import MASK, POSITIONS
from suture.surgery.graph import Graph, input_of, inputs_of, need, output_of, rank, static_dim
from suture.surgery.masks.mask_builders import length_of, lower_right
from suture.surgery.masks.mask_probe import evaluate, probes
from suture.surgery.passes.import_contrib.attentions import attend, grown, split
from suture.surgery.passes.import_contrib.nodes import contrib_nodes, heads_first, refuse_inputs, refuse_outputs
from suture.surgery.passes.import_contrib.rotary import rotate

BOOL = 9
QK_NORM_EPSILON = 1e-6
REFUSED_INPUTS = ("attention_bias", "head_sink", "k_scale", "v_scale", "query_seqlens")


@dataclass
class Heads:
    query: int
    kv: int
    dim: int


def run(graph: Graph) -> int:
    masks: dict[tuple[int, int], gs.Tensor] = {}
    return graph.match(lambda graph, node: _standard(graph, node, masks), contrib_nodes(graph, "GroupQueryAttention"))


def _standard(graph: Graph, node: gs.Node, masks: dict[tuple[int, int], gs.Tensor]) -> bool:
    _refuse(graph, node)
    rotary = bool(node.attrs.get("do_rotary", 0))
    pasts = inputs_of(node, "past_key", "past_value")
    cos, sin, positions = inputs_of(node, "cos_cache", "sin_cache", "position_ids")
    heads = _heads(node, pasts[0], cos if rotary else None)
    need(not rotary or (rank(cos) == 2 and static_dim(cos, -1)), "cos is not a table whose width is known")
    lengths = inputs_of(node, "seqlens_k", "total_sequence_length")
    shared, name = (id(lengths[0]), id(lengths[1])), node.name
    if shared not in masks:
        _check_lengths(graph, *lengths)
        masks[shared] = causal_padded_mask(graph)
    query, key, value = _projections(graph, node, heads)
    epsilons = [node.attrs.get(f"{x}_norm_epsilon", node.attrs.get("qk_norm_epsilon", QK_NORM_EPSILON)) for x in "qk"]
    query = _normed(graph, query, input_of(node, "q_norm_weight"), epsilons[0], f"{name}/q_norm")
    key = _normed(graph, key, input_of(node, "k_norm_weight"), epsilons[1], f"{name}/k_norm")
    if rotary:
        positions = _positions(graph) if positions is None else positions
        interleaved = node.attrs.get("rotary_interleaved", 0)
        query = rotate(graph, query, cos, sin, positions, interleaved, f"{name}/q_rotary")
        key = rotate(graph, key, cos, sin, positions, interleaved, f"{name}/k_rotary")
    presents = [output_of(node, name) for name in ("present_key", "present_value")]
    key, value = (grown(graph, past, new, present, name) for past, new, present in zip(pasts, (key, value), presents))
    attend(graph, node, (query, key, value), masks[shared])
    return True


def _refuse(graph: Graph, node: gs.Node) -> None:
    attrs = node.attrs
    window = attrs.get("local_window_size", -1)
    need(window <= 0, f"it attends to a window of {window} tokens")
    need(not attrs.get("sliding_window_cache", 0), "its cache slides")
    need(not attrs.get("softcap", 0.0), f"it caps scores at {attrs.get('softcap')}, which TensorRT has no attention for")
    need(attrs.get("smooth_softmax", 0) <= 0, "its softmax has one more term (smooth_softmax)")
    need(attrs.get("causal", 1), "it is not causal")
    for side in "kv":
        quantised = attrs.get(f"{side}_quant_type", "NONE")
        need(quantised in ("NONE", b"NONE"), f"its cache is quantised ({quantised})")
    refuse_inputs(node, *REFUSED_INPUTS)
    refuse_outputs(graph, node, "output_qk")


def _heads(node: gs.Node, past: gs.Tensor | None, cos: gs.Tensor | None) -> Heads:
    query_heads, kv_heads = node.attrs["num_heads"], node.attrs["kv_num_heads"]
    key, hidden = input_of(node, "key"), static_dim(input_of(node, "query"), 2)
    need(key is None or rank(key) in (3, None), "its keys come in the cache's layout")
    count = query_heads if key is not None else query_heads + 2 * kv_heads
    need(hidden is None or hidden % count == 0, f"{hidden} features do not divide into {count} heads")
    known = [hidden // count if hidden else None, static_dim(past, 3) if past is not None else None]
    dim = next((size for size in known if size), None)
    need(dim, "the size of a head is not known")
    need(cos is None or 2 * (static_dim(cos, -1) or 0) <= dim, "the tables are wider than a head")
    return Heads(query_heads, kv_heads, dim)


def _projections(graph: Graph, node: gs.Node, heads: Heads) -> list[gs.Tensor]:
    """Query, key and value, each [B, its heads, S, head_dim]."""
    parts, counts = inputs_of(node, "query", "key", "value"), (heads.query, heads.kv, heads.kv)
    if parts[1] is None:
        packed = parts[0]
        sizes = [count * heads.dim for count in counts]
        rows = list(packed.shape[:2]) if rank(packed) == 3 else ["batch", "sequence"]
        parts = split(graph, packed, sizes, rows, node.name)
    return [heads_first(graph, x, count, heads.dim, f"{node.name}/{side}") for x, count, side in zip(parts, counts, "qkv")]


def _normed(graph: Graph, x_BHSD: gs.Tensor, weight: gs.Tensor | None, epsilon: float, name: str) -> gs.Tensor:
    if weight is None:
        return x_BHSD
    attrs = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    return graph.new("RMSNormalization", [x_BHSD, weight], attrs, name, shape=x_BHSD.shape)


def _check_lengths(graph: Graph, seqlens: gs.Tensor, total: gs.Tensor) -> None:
    """Raises NoMatch unless the lengths say what attention_mask says; adds that input where the lengths are inputs."""
    need(graph.signature.tokens is not None, "the graph takes no tokens, of which it says how many count")
    if graph.signature.mask is None:
        given = [any(tensor is each for each in graph.gs.inputs) for tensor in (seqlens, total)]
        need(all(given), "seqlens_k is computed from something else than a mask")
        graph.gs.inputs.append(gs.Variable(MASK, np.int64, ["batch", "total"]))
        graph.signature = replace(graph.signature, mask=MASK)
        return
    need(rank(graph.input(graph.signature.mask)) == 2, "attention_mask is not [batch, past + sequence]")
    for probe in probes(graph):
        values = evaluate(graph, [seqlens, total], probe)
        need(values is not None, "what seqlens_k or total_sequence_length is could not be evaluated")
        need(np.array_equal(values[0].ravel(), probe.mask.sum(1) - 1), "seqlens_k is not sum(attention_mask) - 1")
        need(values[1].item() == probe.mask.shape[1], "total_sequence_length is not the length of attention_mask")


def causal_padded_mask(graph: Graph) -> gs.Tensor:
    """bool [B, 1, S, past + S], from attention_mask and the token input alone."""
    mask, tokens = graph.input(graph.signature.mask), graph.input(graph.signature.tokens)
    total, steps = length_of(graph, mask, 1, "mask/total"), length_of(graph, tokens, 1, "mask/steps")
    past = graph.new("Sub", [total, steps], name="mask/past", dtype=np.int64, shape=[1])
    causal = lower_right(graph, past, steps, total)
    real = graph.new("Cast", [mask], {"to": BOOL}, "mask/real", np.bool_, mask.shape)
    real = graph.new("Unsqueeze", [real, graph.int64([1, 2])], name="mask/real", shape=[mask.shape[0], 1, 1, mask.shape[1]])
    return graph.new("And", [causal, real], name="mask/visible", shape=[mask.shape[0], 1, tokens.shape[1], mask.shape[1]])


def _positions(graph: Graph) -> gs.Tensor:
    """position_ids, int64 [B, S], added to the graph's inputs where there are none."""
    if graph.signature.positions is None:
        tokens = graph.input(graph.signature.tokens)
        graph.gs.inputs.append(gs.Variable(POSITIONS, np.int64, list(tokens.shape[:2])))
        graph.signature = replace(graph.signature, positions=POSITIONS)
    return graph.input(graph.signature.positions)
