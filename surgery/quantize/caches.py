"""A growing cache in 8 bits, with one scale for each layer's keys and one for its values, known beforehand.

    present = concat(past, new)    Attention(query, present)
        →  int8:  present = concat(past, QuantizeLinear(new))                        Attention(query, DequantizeLinear(present))
        →  fp8:   present = QuantizeLinear(concat(DequantizeLinear(past), new))      the same

Concat has no fp8 in the standard; the second form rounds what was rounded before to itself, and the lowering
quantised_cache writes the first one for TensorRT. A static cache stays as it is: TensorRT's update in place takes floats.
"""

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from suture.core.errors import UserError
from suture.core.progress import counted
from suture.core.signature import Cache
from suture.surgery.graph import Graph, onnx_type, producer
from suture.surgery.quantize.formats import FP8, Values
from suture.surgery.quantize.observe import observe
from suture.surgery.quantize.writing import activation_scale


def quantise_caches(graph: Graph, values: Values, windows: np.ndarray) -> int:
    """Rounds every cache of the graph with scales that fit `windows`, token ids [windows, tokens]. Raises UserError where
    a cache is static, or is not grown by one Concat that attention reads."""
    if graph.signature.static or not graph.signature.caches:
        raise UserError("--kv-cache", "the graph has no growing cache", "leave it out, or export with a cache that grows")
    grown = {id(concat.inputs[1]): (cache, concat) for cache in graph.signature.caches for concat in [_concat(graph, cache)]}
    new = [concat.inputs[1] for _, concat in grown.values()]
    largest = dict.fromkeys(grown, 0.0)
    observed = observe(graph, new, windows)
    for tensor, seen in counted("surgery", "fitting caches to text", observed, len(new) * len(windows)):
        largest[id(tensor)] = max(largest[id(tensor)], float(np.abs(seen).max()))
    for key, (cache, concat) in grown.items():
        _quantise(graph, cache, concat, values, largest[key])
    graph.signature = replace(graph.signature, dtype=values.dtype)
    return len(grown)


def _concat(graph: Graph, cache: Cache) -> gs.Node:
    present = next(tensor for tensor in graph.gs.outputs if tensor.name == cache.present)
    concat = producer(present, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.inputs[0].name != cache.past:
        raise UserError("--kv-cache", f"{cache.present} is not {cache.past} with new slots joined to it", "leave it out")
    return concat


def _quantise(graph: Graph, cache: Cache, concat: gs.Node, values: Values, largest: float) -> None:
    past, new = concat.inputs
    present, dtype, name = concat.outputs[0], onnx_type(new), f"layers.{cache.layer}/cache.{cache.role}"
    scale, zero = activation_scale(graph, values, largest, dtype, name)
    readers = [node for node in present.outputs if node.op != "Shape"]
    past.dtype = present.dtype = values.dtype
    if values is FP8:
        wide = graph.new("DequantizeLinear", [past, scale, zero], name=f"{name}/past", dtype=dtype, shape=past.shape)
        joined = graph.new("Concat", [wide, new], dict(concat.attrs), name=name, dtype=dtype, shape=present.shape)
        graph.replace(present, "QuantizeLinear", [joined, scale, zero], name=f"{name}/quantise")
    else:
        q = graph.new("QuantizeLinear", [new, scale, zero], name=f"{name}/quantise", dtype=values.dtype, shape=new.shape)
        graph.replace(present, "Concat", [past, q], dict(concat.attrs), name=name)
    read = graph.new("DequantizeLinear", [present, scale, zero], name=f"{name}/dequantise", dtype=dtype, shape=present.shape)
    for node in readers:
        node.inputs = [read if tensor is present else tensor for tensor in node.inputs]
