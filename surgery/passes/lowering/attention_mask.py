"""Attention gets an explicit mask, made once for all layers, and its scale on the query alone.

    Attention(query, keys, values, mask, nonpad_kv_seqlen, is_causal)
        →  TRT_Attention(query * scale, keys, values, bias)
    bias[b, 0, i, slot] = 0 where slot <= write_indices[b] + i, else a large negative number        [B, 1, S, L]

That bias is the one over a static cache; attention_bias has the others: causal without a cache, other valid lengths, each
with a mask or without. TensorRT's parser silently drops nonpad_kv_seqlen and would attend over the whole cache; its
is_causal counts from the cache's first slot and goes with no mask, and TRT_Attention has none. Its importer multiplies query
and keys by sqrt(scale), which reads and writes the whole key cache at each step; TRT_Attention adds no scale. The mask is
additive, since a boolean one that two layers share does not build for a short sequence.

Without a cache, query and keys in half precision take a factor each, two numbers of that type whose product is the scale: a
multiplication in float32 keeps TensorRT from taking the transposes before it into its attention kernel, and one number of
half precision is not the scale.

A row that a boolean mask lets see nothing is zeros in onnxruntime and the mean of the values in TensorRT: of a constant mask
such rows are zeros in the lowered graph, too; of a computed one the report says that they differ.

On request, the lengths form, which reads no slot beyond a row's last, and is silently wrong on some GPUs:

        →  TRT_Attention(query * scale, keys, values, "", "", kv_lengths = nonpad_kv_seqlen, causal_kind = lower_right)
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, input_of, inputs_of, is_half, need, onnx_type, producer, rank, static_dim
from suture.surgery.passes.lowering.attention_bias import Masks, bias

KNOWN = ("Q", "K", "V", "attn_mask", "nonpad_kv_seqlen", "scale", "is_causal", "softmax_precision", "qk_matmul_output_mode")

SEES_NOTHING = "rows that a mask lets see nothing are zeros in onnxruntime and the mean of the values in TensorRT"


def run(graph: Graph, lengths: bool = False) -> int:
    masks = Masks.of(graph)
    return graph.match(lambda graph, node: _lower(graph, node, masks, lengths), graph.nodes("Attention"))


def _lower(graph: Graph, attention: gs.Node, masks: Masks, lengths: bool) -> bool:
    graph.need_known(attention, *KNOWN)
    query, keys, values = inputs_of(attention, "Q", "K", "V")
    need(rank(query) == 4, f"its query has rank {rank(query)}")
    precision = attention.attrs.get("softmax_precision", 0) or onnx_type(query)
    need(precision == onnx_type(query) or not is_half(query), "its softmax has a precision of its own")
    valid = input_of(attention, "nonpad_kv_seqlen")
    if lengths and valid is not None:
        need(
            input_of(attention, "attn_mask") is None and attention.attrs.get("is_causal"),
            "a mask applies beside the valid length",
        )
        inputs, attrs = [None, None, valid], {"causal_kind": "lower_right"}
    else:
        mask = bias(graph, attention, masks)
        inputs, attrs = [mask] * (mask is not None), {}
    if graph.signature.caches:
        query = scaled(graph, query, scale_of(attention))
    else:
        query, keys = both_scaled(graph, query, keys, scale_of(attention))
    result, seeing = attention.outputs[0], _rows_that_see(graph, input_of(attention, "attn_mask"))
    if seeing is None:
        graph.replace(result, "TRT_Attention", [query, keys, values, *inputs], attrs)
        return True
    dtype = onnx_type(query)
    context = graph.new("TRT_Attention", [query, keys, values, *inputs], attrs, dtype=dtype, shape=result.shape)
    rows = gs.Constant(graph.unique("mask/rows"), seeing)
    graph.replace(result, "Where", [rows, context, graph.number(0, dtype)], name="mask/nothing_seen")
    return True


def _rows_that_see(graph: Graph, mask: gs.Tensor | None) -> np.ndarray | None:
    """bool [..., S, 1], of a constant mask with rows that see nothing; None where all see something, or nobody knows."""
    if mask is None or onnx_type(mask) != onnx.TensorProto.BOOL:
        return None
    values = graph.constant(mask)
    if values is None:
        if SEES_NOTHING not in graph.notes:
            graph.notes.append(SEES_NOTHING)
        return None
    seeing = values.any(axis=-1, keepdims=True)
    return None if seeing.all() else seeing


def scale_of(attention: gs.Node) -> float:
    scale = attention.attrs.get("scale")
    if scale is None:
        size = static_dim(input_of(attention, "Q"), 3)
        need(size, "neither its scale nor its head size is known")
        scale = size**-0.5
    return scale


def scaled(graph: Graph, query: gs.Tensor, scale: float) -> gs.Tensor:
    """query * scale, rounded once: half precision is multiplied in float32 where the scale is not a power of two.

    Of a rotated query the scale is left in float32 for the pass query_scale, which puts it into the rotary tables.
    """
    dtype = onnx_type(query)
    if is_half(query) and producer(query, "RotaryEmbedding") is not None:
        return _times(graph, query, scale)
    if _exact(scale) or not is_half(query):
        return graph.new("Mul", [query, graph.number(scale, dtype)], shape=query.shape)
    wide = graph.new("Cast", [query], {"to": onnx.TensorProto.FLOAT}, dtype=np.float32, shape=query.shape)
    scaled = graph.new("Mul", [wide, graph.number(scale, onnx.TensorProto.FLOAT)], shape=query.shape)
    return graph.new("Cast", [scaled], {"to": dtype}, dtype=dtype, shape=query.shape)


def both_scaled(graph: Graph, query: gs.Tensor, keys: gs.Tensor, scale: float) -> tuple[gs.Tensor, gs.Tensor]:
    """query * a and keys * b, a * b = scale. The query alone where nothing is gained by two."""
    if _exact(scale) or not is_half(query) or producer(query, "RotaryEmbedding") is not None:
        return scaled(graph, query, scale), keys
    of_query, of_keys = factors(scale, onnx_type(query))
    return _times(graph, query, of_query), _times(graph, keys, of_keys)


def factors(scale: float, dtype: int) -> tuple[float, float]:
    """a, a number of the half-precision ONNX type `dtype` near the root of the scale, and scale / a, which is nearly one."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    root = 2.0 ** np.floor(np.log2(scale) / 2)
    numbers = np.unique((root * np.arange(1024, 2048) / 1024).astype(kind).astype(np.float64))
    others = (scale / numbers).astype(kind).astype(np.float64)
    best = numbers[np.abs(numbers * others / scale - 1).argmin()]
    return float(best), float(scale / best)


def _exact(scale: float) -> bool:
    """Whether a product with it is rounded nowhere."""
    return scale > 0 and float(np.log2(scale)).is_integer()


def _times(graph: Graph, x: gs.Tensor, factor: float) -> gs.Tensor:
    """x * factor, of which a float32 copy of the graph has the factor as it is."""
    number, dtype = graph.number(factor, onnx.TensorProto.FLOAT), onnx_type(x)
    return graph.new("Mul", [x, graph.new("Cast", [number], {"to": dtype}, dtype=dtype)], shape=x.shape)
