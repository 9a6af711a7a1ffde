"""Attention that keeps its cache itself hands it over, so that the cache can become static.

    y, present_key, present_value = Attention(query, key, value, mask, past_key, past_value)
        →  present = concat(past, new) of each;  y = Attention(query, present_key, present_value, mask)

Where it is causal by itself, which then would count from the cache's first slot, it gets the mask that this means:
slot <= past length + i. TensorRT takes neither a past nor a second output on Attention.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, input_of, need, onnx_type, rank
from suture.surgery.masks.mask_builders import masked_out

BOOL = 9
KNOWN = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "present_key", "present_value", "scale", "is_causal", "softcap",
         "softmax_precision", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads")  # fmt: skip


def run(graph: Graph) -> int:
    return graph.match(_hand_over, graph.nodes("Attention"))


def _hand_over(graph: Graph, attention: gs.Node) -> bool:
    if any(input_of(attention, name) is None for name in ("past_key", "past_value")):
        return False
    query, key, value, mask, past_key, past_value = attention.inputs[:6]
    need(rank(query) == rank(key) == 4, f"the query has rank {rank(query)}, not [batch, heads, sequence, head_dim]")
    need(input_of(attention, "nonpad_kv_seqlen") is None, "a valid length applies beside a past")
    graph.need_known(attention, *KNOWN)
    attrs = {name: given for name, given in attention.attrs.items() if name != "is_causal"}
    mask = None if mask.is_empty() else mask
    if attention.attrs.get("is_causal"):
        mask = causal(graph, query, past_key, mask)
    presents = []
    for new, past, present in zip((key, value), (past_key, past_value), [*attention.outputs[1:3], None, None]):
        if present is None or present.is_empty():
            present = graph.new("Concat", [past, new], {"axis": 2}, dtype=onnx_type(new))
        else:
            graph.replace(present, "Concat", [past, new], {"axis": 2})
        presents.append(present)
    inputs = [query, *presents] if mask is None else [query, *presents, mask]
    graph.replace(attention.outputs[0], "Attention", inputs, attrs, name=attention.name)
    return True


def causal(graph: Graph, query: gs.Tensor, past: gs.Tensor, mask: gs.Tensor | None) -> gs.Tensor:
    """slot <= past length + i, bool [S, P + S], together with the mask that there is."""
    steps, before = (
        graph.new("Squeeze", [graph.new("Shape", [tensor], {"start": 2, "end": 3}, dtype=np.int64, shape=[1])], shape=[])
        for tensor in (query, past)
    )
    zero, one = graph.int64(0), graph.int64(1)
    own = graph.new("Add", [graph.new("Range", [zero, steps, one], dtype=np.int64), before])
    total = graph.new("Add", [before, steps], shape=[])
    slots = graph.new("Range", [zero, total, one], dtype=np.int64)
    rows = graph.new("Unsqueeze", [own, graph.int64([1])], dtype=np.int64)
    causal = graph.new("LessOrEqual", [slots, rows], dtype=np.bool_)
    if mask is None:
        return causal
    if onnx_type(mask) == BOOL:
        return graph.new("And", [causal, mask], dtype=np.bool_)
    lowest = masked_out(graph, onnx_type(mask))
    return graph.new("Where", [causal, mask, lowest], dtype=onnx_type(mask))
