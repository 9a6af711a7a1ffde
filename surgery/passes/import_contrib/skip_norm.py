"""Norms of onnxruntime become standard ones, and the sum that a skip norm hides is a sum again.

    SimplifiedLayerNormalization(x, weight)                 →  RMSNormalization(x, weight)
    SkipSimplifiedLayerNormalization(x, skip, weight, b)    →  RMSNormalization(x + skip + b, weight)
    SkipLayerNormalization(x, skip, weight, bias, b)        →  LayerNormalization(x + skip + b, weight, bias)

The sum x + skip + b, the fourth output of a skip norm, goes on to the next layer. SimplifiedLayerNormalization lives in
the standard's own domain, too, where onnxruntime put it before there was a standard one.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, input_of, inputs_of, need, onnx_type, output_of
from suture.surgery.passes.import_contrib.nodes import contrib_nodes, refuse_outputs
from suture.surgery.shapes.foreign_shapes import DOMAIN

EPSILON = 1e-5
SKIP_EPSILON = 1e-12


def run(graph: Graph) -> int:
    simplified = [node for domain in ("", DOMAIN) for node in graph.nodes("SimplifiedLayerNormalization", domain=domain)]
    matches = graph.match(_simplified, simplified)
    return matches + graph.match(_skip, contrib_nodes(graph, "SkipSimplifiedLayerNormalization", "SkipLayerNormalization"))


def _simplified(graph: Graph, node: gs.Node) -> bool:
    refuse_outputs(graph, node, "inv_std_var")
    x, weight = node.inputs
    need(onnx_type(weight) is not None and onnx_type(x) is not None, "the types of x and weight are not known")
    if onnx_type(x) != onnx_type(weight):  # the result has the weight's type
        x = graph.new("Cast", [x], {"to": onnx_type(weight)}, dtype=onnx_type(weight), shape=x.shape)
    attrs = {"axis": node.attrs.get("axis", -1), "epsilon": node.attrs.get("epsilon", EPSILON), "stash_type": 1}
    graph.replace(node.outputs[0], "RMSNormalization", [x, weight], attrs)
    return True


def _skip(graph: Graph, node: gs.Node) -> bool:
    refuse_outputs(graph, node, "mean", "inv_std_var")
    simplified = node.op == "SkipSimplifiedLayerNormalization"
    x, skip, weight, bias = inputs_of(node, "input", "skip", "gamma", "bias")
    shift = None if simplified else input_of(node, "beta")
    normed, total = node.outputs[0], output_of(node, "input_skip_bias_sum")
    if bias is not None:
        x = graph.new("Add", [x, bias], name=f"{node.name}/bias", shape=x.shape)
    if total is not None:
        graph.replace(total, "Add", [x, skip])
    else:
        total = graph.new("Add", [x, skip], name=node.name, shape=normed.shape)
    attrs = {"axis": -1, "epsilon": node.attrs.get("epsilon", SKIP_EPSILON), "stash_type": 1}
    if simplified:
        graph.replace(normed, "RMSNormalization", [total, weight], attrs)
    else:
        inputs = [total, weight] if shift is None else [total, weight, shift]
        graph.replace(normed, "LayerNormalization", inputs, attrs)
    return True
