"""Attention that keeps its cache itself gives it away, so that the cache can become static.

    y, present_key, present_value = Attention(query, key, value, mask, past_key, past_value)
        →  present = concat(past, new) of each;  y = Attention(query, present_key, present_value, mask)

Where it is causal by itself, which then would count from the cache's first slot, it gets the mask that this means:
slot <= past length + i. TensorRT takes neither a past nor a second output on Attention.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, input_of, inputs_of, need, onnx_type, output_of, rank
from suture.surgery.masks.mask_builders import both, length_of, lower_right

KNOWN = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "present_key", "present_value", "scale", "is_causal", "softcap",
         "softmax_precision", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads")  # fmt: skip


def run(graph: Graph) -> int:
    return graph.match(_hand_over, graph.nodes("Attention"))


def _hand_over(graph: Graph, attention: gs.Node) -> bool:
    query, key, value, mask, past_key, past_value = inputs_of(attention, "Q", "K", "V", "attn_mask", "past_key", "past_value")
    if past_key is None or past_value is None:
        return False
    need(rank(query) == rank(key) == 4, f"the query has rank {rank(query)}, not [batch, heads, sequence, head_dim]")
    need(input_of(attention, "nonpad_kv_seqlen") is None, "a valid length applies beside a past")
    graph.need_known(attention, *KNOWN)
    attrs = {name: given for name, given in attention.attrs.items() if name != "is_causal"}
    if attention.attrs.get("is_causal"):
        mask = causal(graph, query, key, past_key, mask)
    presents = []
    outputs = [output_of(attention, name) for name in ("present_key", "present_value")]
    for new, past, present in zip((key, value), (past_key, past_value), outputs):
        if present is None:
            present = graph.new("Concat", [past, new], {"axis": 2}, dtype=onnx_type(new))
        else:
            graph.replace(present, "Concat", [past, new], {"axis": 2})
        presents.append(present)
    inputs = [query, *presents] if mask is None else [query, *presents, mask]
    graph.replace(attention.outputs[0], "Attention", inputs, attrs, name=attention.name)
    return True


def causal(graph: Graph, query: gs.Tensor, key: gs.Tensor, past: gs.Tensor, mask: gs.Tensor | None) -> gs.Tensor:
    """slot <= past length + i, bool [S, P + new keys], together with the mask that there is."""
    steps, new, before = (length_of(graph, tensor, 2, "mask/length") for tensor in (query, key, past))
    total = graph.new("Add", [before, new], name="mask/total", shape=[1])
    return both(graph, lower_right(graph, before, steps, total), mask)
