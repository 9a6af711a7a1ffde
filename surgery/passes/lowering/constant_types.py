"""A constant in a type that TensorRT does not compute in is cast before it is moved about, not after.

Cast(move(W))   →   move(Cast(W))        W: small unsigned integers, or int16; a cast constant is one

As in GPT-2's triangle of uint8, of which each step cuts a square that it then takes for booleans.
"""

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, onnx_type, producer
from suture.surgery.graph.weights import add_weight, read_array

TYPES = (TensorProto.UINT8, TensorProto.UINT16, TensorProto.INT16, TensorProto.UINT32)
TARGETS = (TensorProto.BOOL, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64)
MOVES = ("Expand", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def run(graph: Graph) -> int:
    made: dict[tuple[int, int], gs.Constant] = {}
    return graph.match(lambda graph, node: _cast_first(graph, node, made), graph.nodes("Cast"))


def _cast_first(graph: Graph, cast: gs.Node, made: dict[tuple[int, int], gs.Constant]) -> bool:
    tensor, to, moves = cast.inputs[0], cast.attrs["to"], []
    while (move := producer(tensor, *MOVES)) is not None:
        moves.append(move)
        tensor = move.inputs[0]
    if not moves or not isinstance(tensor, gs.Constant) or onnx_type(tensor) not in TYPES or to not in TARGETS:
        return False
    key = (id(tensor), to)
    if key not in made:
        values = read_array(graph, tensor, onnx_type(tensor)).astype(onnx.helper.tensor_dtype_to_np_dtype(to))
        made[key] = add_weight(graph, f"{tensor.name}/cast", to, list(values.shape), iter([values]))
    moved: gs.Tensor = made[key]
    for move in reversed(moves):
        moved = graph.new(move.op, [moved, *move.inputs[1:]], dict(move.attrs), dtype=to, shape=move.outputs[0].shape)
    graph.redirect(cast.outputs[0], moved)
    return True
