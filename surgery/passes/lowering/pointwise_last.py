"""Of a sum of two convolutions the pointwise one is computed last.

    Conv1x1(x) + ConvKxK(y)   →   ConvKxK(y) + Conv1x1(x)

A graph is written depth first, so a sum's second operand is computed after its first. TensorRT adds the one that it has to the
one that it computes; a pointwise convolution it computes as a product, which takes a bias and that sum along, while first of
the two it leaves its bias to a kernel of its own. Exporters write a residual block's sum shortcut first.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, producer


def run(graph: Graph) -> int:
    return graph.match(_swap, graph.nodes("Add"))


def _swap(graph: Graph, add: gs.Node) -> bool:
    first, second = (producer(tensor, "Conv") for tensor in add.inputs)
    if first is None or second is None or not _pointwise(first) or _pointwise(second):
        return False
    add.inputs = [add.inputs[1], add.inputs[0]]
    return True


def _pointwise(conv: gs.Node) -> bool:
    kernel = conv.inputs[1].shape
    return kernel is not None and all(size == 1 for size in kernel[2:])
