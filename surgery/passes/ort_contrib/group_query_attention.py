"""Attention over a static cache, with what rotates and writes keys before it, becomes one node.

    Attention(rotate(q), TensorScatter(past_k, rotate(k)), TensorScatter(past_v, v), write_indices + S)
        →  GroupQueryAttention(q, k, v, past_k, past_v, seqlens_k = write_indices + S - 1, L, cos, sin, position_ids)

q, k and v come tokens first, [B, S, heads * D], side by side in one tensor where one projection made them: nothing is
transposed. cos and sin are the tables of all L positions, [L, D/2], worked out here: they must not depend on anything but
the position, so a cache that outgrows the length from which dynamic NTK changes them stays as it is.

onnxruntime takes several tokens a step for one row only, and several rows for one token only.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, input_of, inputs_of, need, onnx_type, producer, rank, static_dim
from suture.surgery.masks.mask_probe import evaluate, probes
from suture.surgery.passes.ort_contrib.nodes import append
from suture.surgery.passes.ort_contrib.rotary_tables import Tables, rotary_tables
from suture.surgery.passes.portable.packed_heads import HEADS_FIRST

INT32 = 6
ROWS = [0, 0, -1]


@dataclass
class Shared:
    """What layers have in common, by what it was made from."""

    tables: dict[tuple[int, ...], Tables] = field(default_factory=dict)
    lengths: dict[int, tuple[gs.Tensor, gs.Tensor]] = field(default_factory=dict)


def run(graph: Graph) -> int:
    shared = Shared()
    matches = graph.match(lambda graph, node: _fuse(graph, node, shared), graph.nodes("Attention"))
    reasons = dict.fromkeys(miss.reason for miss in graph.near_misses)
    graph.notes += [f"model.ort.onnx: attention stays the standard's where {reason}" for reason in reasons]
    return matches


def _fuse(graph: Graph, attention: gs.Node, shared: Shared) -> bool:
    query, *cached = inputs_of(attention, "Q", "K", "V")
    updates = [producer(tensor, "TensorScatter") for tensor in cached]
    if any(update is None for update in updates):
        return False
    for update in updates:
        linear = update.attrs.get("mode", b"linear") in ("linear", b"linear") and update.attrs.get("axis", -2) in (-2, 2)
        need(linear and input_of(update, "write_indices") is not None, "its cache is not written in place, slot after slot")
    valid, *others = inputs_of(attention, "nonpad_kv_seqlen", "attn_mask", "past_key", "past_value")
    need(valid is not None and attention.attrs.get("is_causal"), "what it sees is not just the tokens before")
    need(all(each is None for each in others), "a mask applies beside the valid length")
    graph.need_known(attention, "Q", "K", "V", "nonpad_kv_seqlen", "is_causal", "scale")
    capacity, kv_heads = static_dim(cached[0], 2), static_dim(cached[0], 1)
    heads, head_dim = static_dim(query, 1), static_dim(query, 3)
    need(capacity and heads and kv_heads and head_dim, "sizes of heads or cache are not known")
    need(rank(query) == 4 and static_dim(cached[1], 3) == head_dim, "queries, keys and values differ in head_dim")
    need(head_dim % 8 == 0, f"onnxruntime takes no head_dim of {head_dim}")
    new = [input_of(update, "update") for update in updates]
    rotations = [producer(tensor, "RotaryEmbedding") for tensor in (query, new[0])]
    need((rotations[0] is None) == (rotations[1] is None), "of query and key only one is rotated")
    attrs = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": float(attention.attrs.get("scale", head_dim**-0.5))}
    rotary = [None, None, None]
    if rotations[0] is not None:
        positions = graph.signature.positions
        need(graph.signature.position_rows is None, "a token has several positions, and its table is looked up by one")
        rotary = [*rotary_tables(graph, *rotations, capacity, shared.tables), positions and graph.input(positions)]
        attrs |= {"do_rotary": 1, "rotary_interleaved": rotations[0].attrs.get("interleaved", 0)}
        query, new[0] = (input_of(rotation, "X") for rotation in rotations)
    lengths = _lengths(graph, valid, input_of(updates[0], "write_indices"), capacity, shared)
    name, result = attention.name, attention.outputs[0]
    inputs = [
        *_tokens_first(graph, [query, *new], name),
        *(input_of(update, "past_cache") for update in updates),
        *lengths,
        *rotary,
    ]
    context = gs.Variable(graph.unique(f"{name}/context"), onnx_type(result), [*_steps(graph), heads * head_dim])
    append(graph, "GroupQueryAttention", name, inputs, [context, *cached], attrs)
    _heads_first(graph, context, result, heads, head_dim)
    return True


def _lengths(
    graph: Graph, valid: gs.Tensor, write_indices: gs.Tensor, capacity: int, shared: Shared
) -> tuple[gs.Tensor, gs.Tensor]:
    """seqlens_k, int32 [B], and total_sequence_length, int32 [1]."""
    if id(valid) not in shared.lengths:
        need(write_indices.name == graph.signature.write_indices, "what says where its cache is written is not an input")
        for probe in probes(graph):
            values = evaluate(graph, [valid], probe)
            need(values is not None, "what says how much of its cache is valid could not be worked out")
            need(np.array_equal(values[0].ravel(), np.full(probe.batch, probe.past + probe.steps)), "its cache has gaps")
        last = graph.new("Sub", [valid, graph.int64([1])], name="last_slot", shape=["batch"])
        last = graph.new("Cast", [last], {"to": INT32}, "last_slot", np.int32, ["batch"])
        shared.lengths[id(valid)] = last, gs.Constant(graph.unique("capacity"), np.array([capacity], np.int32))
    return shared.lengths[id(valid)]


def _tokens_first(graph: Graph, heads: list[gs.Tensor], name: str) -> list[gs.Tensor | None]:
    """Query, key and value, each [B, S, heads * D]; all in the first where they are the three parts of one projection."""
    split = producer(heads[0], "Split")
    parts = split.outputs if split is not None and split.attrs.get("axis", 0) == 1 else []
    if [id(part) for part in parts] == [id(part) for part in heads]:
        return [_rows(graph, split.inputs[0], f"{name}/qkv"), None, None]
    return [_rows(graph, part, f"{name}/{side}") for part, side in zip(heads, "qkv")]


def _rows(graph: Graph, x_BHSD: gs.Tensor, name: str) -> gs.Tensor:
    """[B, S, H * D] of heads [B, H, S, D]: as it was before it was transposed, or transposed back."""
    heads, head_dim = static_dim(x_BHSD, 1), static_dim(x_BHSD, 3)
    norm = producer(x_BHSD, "RMSNormalization")
    x = _before_transpose(graph, x_BHSD if norm is None else norm.inputs[0], name)
    if norm is not None:  # over D, whichever way heads and tokens lie
        x = graph.new("RMSNormalization", [x, norm.inputs[1]], dict(norm.attrs), norm.name, shape=x.shape)
    return graph.new("Reshape", [x, graph.int64(ROWS)], name=name, shape=[*_steps(graph), heads * head_dim])


def _before_transpose(graph: Graph, x_BHSD: gs.Tensor, name: str) -> gs.Tensor:
    transpose = producer(x_BHSD, "Transpose")
    if transpose is not None and list(transpose.attrs.get("perm", [])) == HEADS_FIRST:
        return transpose.inputs[0]
    batch, heads, steps, head_dim = x_BHSD.shape
    return graph.new("Transpose", [x_BHSD], {"perm": HEADS_FIRST}, name, shape=[batch, steps, heads, head_dim])


def _heads_first(graph: Graph, context: gs.Tensor, result: gs.Variable, heads: int, head_dim: int) -> None:
    """What read the result [B, H, S, D] reads it from the context [B, S, H * D]."""
    apart = [*context.shape[:2], heads, head_dim]
    together = graph.new("Reshape", [context, graph.int64([0, 0, heads, head_dim])], name=result.name, shape=apart)
    for node in list(result.outputs):
        if node.op == "Transpose" and list(node.attrs.get("perm", [])) == HEADS_FIRST:
            graph.redirect(node.outputs[0], together)
    if any(node.op != "Transpose" for node in result.outputs):
        graph.replace(result, "Transpose", [together], {"perm": HEADS_FIRST})


def _steps(graph: Graph) -> list:
    return list(graph.input(graph.signature.tokens).shape[:2])
