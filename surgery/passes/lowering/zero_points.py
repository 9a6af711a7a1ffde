"""Quantised integers that TensorRT has no type for become int8 around 0 where they can, else arithmetic.

    Q(x, s, 128) → moves → DQ(·, s, 128)   →   Q(x, s) → moves → DQ(·, s)           uint8 to int8, each number 128 less
    DQ(W, s, z)                            →   DQ(W - z, s)                         where the constant W - z fits int8
    Q(x, s, z)                             →   Clip(Round(x / s) + z, lowest, largest)
    DQ(q, s, z)                            →   (q - z) * s

TensorRT quantises to int8 with zero point 0 alone. Between the two the numbers are whole floats, which hold them exactly; a
graph's own inputs and outputs keep their type, by a Cast. What else reads such numbers leaves all of them as they are.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues

from suture.surgery.graph import Graph, input_of, is_half, need, onnx_type, op_of, rank
from suture.surgery.graph.weights import add_weight, read_array

LIMITS = {
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT16: (0, 65535),
}
KINDS = (*LIMITS, TensorProto.INT32)
MOVES = ("Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
DATA = {"Concat": None}  # all inputs; of the others the first
MIDDLE = 128


def run(graph: Graph) -> int:
    ends = [node for node in graph.nodes("QuantizeLinear", "DequantizeLinear") if not _native(graph, node)]
    done: set[int] = set()
    return graph.match(lambda graph, node: _rewrite(graph, node, done), ends)


def _small(node: gs.Node) -> gs.Tensor:
    """Of its two ends the one that holds integers."""
    return node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]


def _kind(node: gs.Node) -> int | None:
    """The integers' type."""
    if node.op == "DequantizeLinear":
        return onnx_type(node.inputs[0])
    zero = input_of(node, "y_zero_point")
    return onnx_type(zero) if zero is not None else node.attrs.get("output_dtype") or TensorProto.UINT8


def _zero(graph: Graph, node: gs.Node) -> np.ndarray | None:
    """Its zero points, 0 where it has none; None where they are computed."""
    zero = input_of(node, "y_zero_point" if node.op == "QuantizeLinear" else "x_zero_point")
    return np.zeros((), np.int64) if zero is None else graph.constant(zero)


def _native(graph: Graph, node: gs.Node) -> bool:
    """Whether TensorRT takes it as it is."""
    if _kind(node) not in KINDS:
        return True
    zero = _zero(graph, node)
    return _kind(node) == TensorProto.INT8 and zero is not None and not zero.any()


def _rewrite(graph: Graph, node: gs.Node, done: set[int]) -> bool:
    if id(node) in done:
        return False
    tensors, moves, ends = _region(graph, _small(node))
    for each in ends:
        graph.need_known(each, "x", "x_scale", "y_scale", "x_zero_point", "y_zero_point", "axis", "output_dtype")
        need(_zero(graph, each) is not None, "its zero points are computed")
        need(_kind(each) in KINDS, "its integers are of another type than those before it")
    own = [tensor for tensor in tensors if isinstance(tensor, gs.Constant)]
    outside = [tensor for tensor in tensors if tensor in graph.gs.inputs or graph.is_output(tensor)]
    kinds = {_kind(each) for each in ends}
    around = {int(value) for each in ends for value in _zero(graph, each).ravel()}
    if kinds == {TensorProto.UINT8} and around == {MIDDLE} and not outside:
        _shift(graph, tensors, own, ends)
    elif len(tensors) == len(own) == 1 and (values := _around_zero(graph, own[0], ends)) is not None:
        for each in ends:
            _set(each, _constant(graph, own[0], values), np.int8)
    else:
        wide = any(_wide(onnx_type(tensor)) and onnx_type(tensor) != TensorProto.INT32 for tensor in outside)
        need(not wide, "TensorRT has no inputs and outputs of 16-bit integers")
        need(not any(is_half(input_of(each, _scale(each))) for each in ends if _wide(_kind(each))), "16 bits in half precision")
        _count(graph, tensors, moves, ends, outside)
    done |= {id(each) for each in ends}
    return True


def _region(graph: Graph, first: gs.Tensor) -> tuple[list[gs.Tensor], list[gs.Node], list[gs.Node]]:
    """The tensors of the same integers, the nodes that move them about, and those that quantise and dequantise."""
    waiting, tensors, moves, ends = [first], {}, {}, {}
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in tensors:
            continue
        tensors[id(tensor)] = tensor
        maker = tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None
        if maker is not None and op_of(maker) == "QuantizeLinear":
            ends[id(maker)] = maker
        elif maker is not None:
            _need_move(maker, tensor)
            moves[id(maker)] = maker
            waiting += [*_moved(maker), *maker.outputs]
        for reader in tensor.outputs:
            if op_of(reader) == "DequantizeLinear" and reader.inputs[0] is tensor:
                ends[id(reader)] = reader
            else:
                _need_move(reader, tensor)
                moves[id(reader)] = reader
                waiting += [*_moved(reader), *reader.outputs]
    return list(tensors.values()), list(moves.values()), list(ends.values())


def _moved(node: gs.Node) -> list[gs.Tensor]:
    return list(node.inputs) if node.op == "Concat" else node.inputs[:1]


def _need_move(node: gs.Node, tensor: gs.Tensor) -> None:
    moves = op_of(node) in MOVES and all(
        each is not tensor for each in node.inputs if id(each) not in set(map(id, _moved(node)))
    )
    need(moves, f"the {node.op} {node.name} computes with its integers")


def _scale(node: gs.Node) -> str:
    return "y_scale" if node.op == "QuantizeLinear" else "x_scale"


def _wide(kind: int | None) -> bool:
    return kind not in (TensorProto.INT8, TensorProto.UINT8)


def _set(node: gs.Node, tensor: gs.Tensor | None, dtype: type) -> None:
    """Zero points 0, and of a DequantizeLinear what it reads."""
    scale = node.inputs[1]
    data = tensor if tensor is not None and node.op == "DequantizeLinear" else node.inputs[0]
    zeros = np.zeros([int(size) for size in scale.shape], dtype)
    node.inputs = [data, scale, gs.Constant(f"{node.outputs[0].name}/zero_point", zeros)]
    node.attrs.pop("output_dtype", None)


def _shift(graph: Graph, tensors: list[gs.Tensor], own: list[gs.Tensor], ends: list[gs.Node]) -> None:
    for constant in own:
        values = read_array(graph, constant, TensorProto.UINT8)
        signed = _constant(graph, constant, (values ^ np.uint8(MIDDLE)).view(np.int8))
        for reader in list(constant.outputs):
            reader.inputs = [signed if each is constant else each for each in reader.inputs]
    for tensor in tensors:
        if isinstance(tensor, gs.Variable):
            tensor.dtype = np.int8
    for node in ends:
        _set(node, None, np.int8)


def _constant(graph: Graph, like: gs.Tensor, values: np.ndarray) -> gs.Constant:
    dtype = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    return add_weight(graph, f"{like.name}/signed", dtype, list(values.shape), iter([np.ascontiguousarray(values)]))


def _around_zero(graph: Graph, constant: gs.Tensor, ends: list[gs.Node]) -> np.ndarray | None:
    """W - z as int8, where that holds them and all that read W have the same zero points."""
    values, first = read_array(graph, constant, onnx_type(constant)), ends[0]
    zero = _along(_zero(graph, first), first, values.ndim)
    if any(not np.array_equal(_zero(graph, each), _zero(graph, first)) or each.attrs != first.attrs for each in ends):
        return None
    lowest, largest = int(values.min(initial=0)), int(values.max(initial=0))
    if lowest - int(zero.max()) < -1024 or largest - int(zero.min()) > 1024:
        return None
    centred = values.astype(np.int16) - zero.astype(np.int16)
    return centred.astype(np.int8) if centred.min(initial=0) >= -128 and centred.max(initial=0) <= 127 else None


def _along(values: np.ndarray, node: gs.Node, dims: int | None) -> np.ndarray:
    """One number for all, or one for each place along its axis, in a shape that broadcasts."""
    if values.size == 1:
        return values.reshape(())
    need(values.ndim == 1, "it quantises in blocks")
    need(dims is not None, "its rank is not known")
    axis = node.attrs.get("axis", 1) % dims
    return values.reshape([-1 if each == axis else 1 for each in range(dims)])


# --- as arithmetic --------------------------------------------------------------------------------------------------------


def _count(graph: Graph, tensors: list[gs.Tensor], moves: list[gs.Node], ends: list[gs.Node], outside: list) -> None:
    """The integers as whole floats."""
    kinds = {id(tensor): onnx_type(tensor) for tensor in tensors}
    dtype = onnx_type(input_of(ends[0], _scale(ends[0])))
    need(all(onnx_type(input_of(each, _scale(each))) == dtype for each in ends), "its scales are of two types")
    dims = {id(each): rank(each.inputs[0]) for each in ends}
    made = [(each, _parameters(graph, each, dims[id(each)], dtype)) for each in ends]
    for tensor in tensors:
        if isinstance(tensor, gs.Constant) or tensor in graph.gs.inputs:
            _read_as_floats(graph, tensor, kinds[id(tensor)], dtype)
        elif graph.is_output(tensor):
            _written_as_floats(graph, tensor, dtype)
        else:
            tensor.dtype = dtype
    for node, (scale, zero) in made:
        if node.op == "QuantizeLinear":
            _quantise(graph, node, scale, zero, dtype)
        else:
            _dequantise(graph, node, scale, zero, dtype)


def _parameters(graph: Graph, node: gs.Node, dims: int | None, dtype: int) -> tuple[gs.Tensor, np.ndarray]:
    scale, zero = node.inputs[1], _zero(graph, node)
    size = int(np.prod(scale.shape, dtype=np.int64))
    shape = list(_along(np.zeros([int(each) for each in scale.shape]), node, dims).shape)
    if list(scale.shape) != shape:
        scale = graph.new("Reshape", [scale, graph.int64(shape)], shape=shape)
    return scale, _along(np.broadcast_to(zero, [size]) if size > 1 else zero, node, dims)


def _read_as_floats(graph: Graph, tensor: gs.Tensor, kind: int, dtype: int) -> None:
    readers = list(tensor.outputs)
    source = tensor
    if isinstance(tensor, gs.Constant) and kind != TensorProto.INT8:  # the parser takes constants of two integer types
        values = read_array(graph, tensor, kind)
        source = add_weight(
            graph, f"{tensor.name}/int32", TensorProto.INT32, list(values.shape), iter([values.astype(np.int32)])
        )
    floats = graph.new("Cast", [source], {"to": dtype}, f"{tensor.name}/floats", dtype=dtype, shape=tensor.shape)
    for reader in readers:
        reader.inputs = [floats if each is tensor else each for each in reader.inputs]


def _written_as_floats(graph: Graph, tensor: gs.Variable, dtype: int) -> None:
    floats = gs.Variable(graph.unique(f"{tensor.name}/floats"), dtype, tensor.shape)
    maker, kind = tensor.inputs[0], onnx_type(tensor)
    for reader in list(tensor.outputs):
        reader.inputs = [floats if each is tensor else each for each in reader.inputs]
    maker.outputs = [floats if each is tensor else each for each in maker.outputs]
    graph.replace(tensor, "Cast", [floats], {"to": kind})


def _quantise(graph: Graph, node: gs.Node, scale: gs.Tensor, zero: np.ndarray, dtype: int) -> None:
    x, result, kind = node.inputs[0], node.outputs[0], _kind(node)
    wide = TensorProto.FLOAT
    if is_half(x):  # onnxruntime divides in float32
        x = graph.new("Cast", [x], {"to": wide}, dtype=wide, shape=x.shape)
    if is_half(scale):
        scale = graph.new("Cast", [scale], {"to": wide}, dtype=wide, shape=scale.shape)
    whole = graph.new("Round", [graph.new("Div", [x, scale], shape=x.shape)], shape=x.shape)
    if zero.any():
        whole = graph.new("Add", [whole, _number(graph, zero, wide)], shape=x.shape)
    limits = [graph.number(limit, wide) for limit in LIMITS[kind]]
    if dtype == wide:
        graph.replace(result, "Clip", [whole, *limits])
    else:
        graph.replace(result, "Cast", [graph.new("Clip", [whole, *limits], shape=x.shape)], {"to": dtype})


def _dequantise(graph: Graph, node: gs.Node, scale: gs.Tensor, zero: np.ndarray, dtype: int) -> None:
    x, result = node.inputs[0], node.outputs[0]
    if zero.any():
        x = graph.new("Sub", [x, _number(graph, zero, dtype)], dtype=dtype, shape=x.shape)
    graph.replace(result, "Mul", [x, scale])


def _number(graph: Graph, values: np.ndarray, dtype: int) -> gs.Constant:
    array = values.astype(onnx.helper.tensor_dtype_to_np_dtype(dtype))
    return gs.Constant(graph.unique("zero_point"), LazyValues(onnx.numpy_helper.from_array(array)))
