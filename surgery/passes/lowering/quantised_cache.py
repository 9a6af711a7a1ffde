"""A cache of fp8 grows by what is new alone, instead of being rounded again as a whole.

    QuantizeLinear(concat(DequantizeLinear(past), new))  →  concat(past, QuantizeLinear(new))

The standard's Concat has no fp8, TensorRT's has: so the cache is not read, widened and rounded again at each step.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, onnx_type, producer


def run(graph: Graph) -> int:
    return graph.match(_join_small, graph.nodes("QuantizeLinear"))


def _join_small(graph: Graph, quantise: gs.Node) -> bool:
    present = quantise.outputs[0]
    concat = producer(quantise.inputs[0], "Concat")
    widened = producer(concat.inputs[0], "DequantizeLinear") if concat is not None else None
    if widened is None or not graph.is_output(present) or len(concat.inputs) != 2:
        return False
    past, new = widened.inputs[0], concat.inputs[1]
    need(onnx_type(past) == onnx_type(present), "the cache is rounded to another type than it has")
    for node in (quantise, widened):
        graph.need_known(node, "x", "x_scale", "x_zero_point", "y_scale", "y_zero_point", "axis", "output_dtype", "saturate")
    need(quantise.attrs.get("axis", 1) == widened.attrs.get("axis", 1), "the cache is rounded along two axes")
    need(all(a is b for a, b in zip(quantise.inputs[1:], widened.inputs[1:])), "the cache is rounded with two scales")
    need(len(concat.outputs[0].outputs) == 1, "the widened cache is read by others, too")
    inputs, name = [new, *quantise.inputs[1:]], f"{quantise.name}/new"
    small = graph.new("QuantizeLinear", inputs, dict(quantise.attrs), name, onnx_type(past), new.shape)
    graph.replace(present, "Concat", [past, small], dict(concat.attrs), name=concat.name)
    return True
