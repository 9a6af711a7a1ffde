"""A loop that ends by its condition alone counts its rounds itself, where its body reads their number; and has a condition.

    Loop(M >= 2^31 - 1 or none, cond, v…, body(i, …))   →   Loop(M, cond, v…, 0, body(·, …, i; …, i + 1))
    Loop(M, none, v…, body)                             →   Loop(M, true, v…, body)

TensorRT takes such a trip count for none at all, and then has no number of the round; without a condition its parser has no
tensor for the one that the body reads.
"""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, input_of

UNLIMITED = 2**31 - 1
OUTSIDE = 2  # inputs of a body before the carried ones: the round's number and the condition


def run(graph: Graph) -> int:
    return graph.match(lambda graph, loop: _conditioned(graph, loop) | _count(graph, loop), graph.nodes("Loop"))


def _conditioned(graph: Graph, loop: gs.Node) -> bool:
    if input_of(loop, "cond") is not None:
        return False
    loop.inputs[1] = gs.Constant(graph.unique("true"), np.array(True))
    return True


def _count(graph: Graph, loop: gs.Node) -> bool:
    body, most = loop.attrs["body"], graph.scalar(input_of(loop, "M"))
    number = body.inputs[0]
    limited = input_of(loop, "M") is not None and (most is None or most < UNLIMITED)
    if limited or not (number.outputs or any(each is number for each in body.outputs)):
        return False
    carried = len(loop.inputs) - OUTSIDE
    own = gs.Variable(graph.unique(f"{number.name}/carried"), TensorProto.INT64, [])
    following = gs.Variable(graph.unique(f"{number.name}/next"), TensorProto.INT64, [])
    one = gs.Constant(graph.unique("one"), np.array(1, np.int64))
    for node in list(number.outputs):
        node.inputs = [own if each is number else each for each in node.inputs]
    body.outputs = [own if each is number else each for each in body.outputs]
    body.nodes.append(gs.Node("Add", following.name, {}, [own, one], [following]))
    body.inputs.append(own)
    body.outputs.insert(1 + carried, following)
    loop.inputs.append(graph.int64(0))
    loop.outputs.insert(carried, gs.Variable(graph.unique(f"{loop.name}/rounds"), TensorProto.INT64, []))
    return True
