"""A cache of fp8 grows by what is new alone, instead of being rounded again as a whole.

    QuantizeLinear(concat(DequantizeLinear(past), new))  →  concat(past, QuantizeLinear(new))

The standard's Concat has no fp8, TensorRT's has: so the cache is not read, widened and rounded again at each step.
"""

import onnx_graphsurgeon as gs

from surgery.graph import Graph, need, onnx_type, producer


def run(graph: Graph) -> int:
    return graph.match(_join_small, graph.nodes("QuantizeLinear"))


def _join_small(graph: Graph, quantise: gs.Node) -> bool:
    present = quantise.outputs[0]
    concat = producer(quantise.inputs[0], "Concat")
    widened = producer(concat.inputs[0], "DequantizeLinear") if concat is not None else None
    if widened is None or not graph.is_output(present) or len(concat.inputs) != 2:
        return False
    past, new = widened.inputs[0], concat.inputs[1]
    need(all(a is b for a, b in zip(quantise.inputs[1:], widened.inputs[1:])), "the cache is rounded with two scales")
    need(len(concat.outputs[0].outputs) == 1, "the widened cache is read by others, too")
    small = graph.new(
        "QuantizeLinear", [new, *quantise.inputs[1:]], name=f"{quantise.name}/new", dtype=onnx_type(past), shape=new.shape
    )
    graph.replace(present, "Concat", [past, small], dict(concat.attrs), name=concat.name)
    return True
