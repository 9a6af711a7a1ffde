"""Attention over a static cache gets an explicit mask, made once for all layers, and its scale on the query alone.

    Attention(query, keys, values, nonpad_kv_seqlen, is_causal)
        →  TRT_Attention(query * scale, keys, values, mask)
    mask[b, 0, i, slot] = 0 where slot <= write_indices[b] + i, else a large negative number        [B, 1, S, L]

TensorRT's parser drops nonpad_kv_seqlen without a word and would attend over the whole cache; its is_causal counts from
the cache's first slot. Its importer multiplies query and keys by sqrt(scale), which reads and writes the whole key cache
at each step; TRT_Attention adds no scale. The mask is additive, since a boolean one that two layers share does not build
for a short sequence; one that is boolean, as in a graph whose cache grows, becomes where(mask, 0, a large negative number).

On request, the lengths form, which reads no slot beyond a row's last, and is silently wrong on some GPUs:

        →  TRT_Attention(query * scale, keys, values, "", "", kv_lengths = nonpad_kv_seqlen, causal_kind = lower_right)
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from surgery.graph import Graph, is_half, need, onnx_type, producer, static_dim
from surgery.slots import HIDDEN, causal_bias

BOOL = onnx.TensorProto.BOOL


def run(graph: Graph, lengths: bool = False) -> int:
    masks: dict[tuple[int, int], gs.Tensor] = {}
    return graph.match(lambda graph, node: _lower(graph, node, masks, lengths), graph.nodes("Attention"))


def _lower(graph: Graph, attention: gs.Node, masks: dict[tuple[int, int], gs.Tensor], lengths: bool) -> bool:
    query, keys, values = attention.inputs[:3]
    inputs, attrs = [], {}
    mask = attention.inputs[3] if len(attention.inputs) > 3 and not attention.inputs[3].is_empty() else None
    if len(attention.inputs) > 6:
        need(producer(keys, "TensorScatter") is not None, "its keys are not a static cache's")
        need(mask is None and attention.attrs.get("is_causal"), "a mask applies beside the valid length")
        if lengths:
            inputs, attrs = [None, None, attention.inputs[6]], {"causal_kind": "lower_right"}
        else:
            mask = _shared_mask(graph, producer(keys, "TensorScatter"), onnx_type(query), masks)
    if mask is not None and onnx_type(mask) == BOOL:
        mask = _additive(graph, mask, onnx_type(query), masks)
    scale = attention.attrs.get("scale")
    if scale is None:
        need(static_dim(query, 3), "neither its scale nor its head size is known")
        scale = static_dim(query, 3) ** -0.5
    inputs = [_scaled(graph, query, scale), keys, values, *(inputs or [mask] * (mask is not None))]
    graph.replace(attention.outputs[0], "TRT_Attention", inputs, attrs)
    return True


def _scaled(graph: Graph, query: gs.Tensor, scale: float) -> gs.Tensor:
    """query * scale, rounded once: half precision is multiplied in float32 where the scale is not a power of two.

    Of a rotated query the scale is left in float32 for the pass query_scale, which puts it into the rotary tables.
    """
    dtype = onnx_type(query)
    if is_half(query) and producer(query, "RotaryEmbedding") is not None:
        number = graph.number(scale, onnx.TensorProto.FLOAT)
        return graph.new("Mul", [query, graph.new("Cast", [number], {"to": dtype}, dtype=dtype)], shape=query.shape)
    exact = float(np.log2(scale)).is_integer()
    if exact or not is_half(query):
        return graph.new("Mul", [query, graph.number(scale, dtype)], shape=query.shape)
    wide = graph.new("Cast", [query], {"to": onnx.TensorProto.FLOAT}, dtype=np.float32, shape=query.shape)
    scaled = graph.new("Mul", [wide, graph.number(scale, onnx.TensorProto.FLOAT)], shape=query.shape)
    return graph.new("Cast", [scaled], {"to": dtype}, dtype=dtype, shape=query.shape)


def _shared_mask(graph: Graph, update: gs.Node, dtype: int, masks: dict[tuple[int, int], gs.Tensor]) -> gs.Tensor:
    past, _, write_indices = update.inputs
    key = (id(write_indices), dtype)
    if key not in masks:
        masks[key] = causal_bias(graph, write_indices, past, dtype)
    return masks[key]


def _additive(graph: Graph, mask: gs.Tensor, dtype: int, masks: dict[tuple[int, int], gs.Tensor]) -> gs.Tensor:
    key = (id(mask), dtype)
    if key not in masks:
        hidden = graph.number(HIDDEN[onnx.TensorProto.DataType.Name(dtype)], dtype)
        inputs = [mask, graph.number(0, dtype), hidden]
        masks[key] = graph.new("Where", inputs, name="mask/additive", dtype=dtype, shape=mask.shape)
    return masks[key]
