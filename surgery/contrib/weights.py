"""Weights that a pass reads whole and writes anew, a slab at a time: repacked, never decoded, never in memory at once.

A new weight goes into the graph where it is small, else at the end of graph.weights_file. All weights of a graph lie under
one root folder, so the file's folder must also hold what the graph already refers to: whoever sets `weights_file` first
copies the source's weight files beside it (contracts.weights.place_weights with `beside`). Where there is no such
file, as in tests on small graphs, new weights stay in the graph.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues

from surgery.graph import Graph, is_external

INLINE = 1 << 16  # bytes; what is smaller stays in the graph
SLAB = 1 << 22  # elements that a transposition holds at once
ALIGNMENT = 4096
BITS = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8}


def new_file(folder: Path) -> Path:
    """A name for a weights file that nothing in the folder has: what lies there came from the source."""
    names = itertools.chain(["repacked.data"], (f"repacked_{number}.data" for number in itertools.count(2)))
    return next(folder / name for name in names if not (folder / name).exists())


def read_bytes(graph: Graph, constant: gs.Constant) -> np.ndarray:
    """A constant's bytes, uint8 [bytes], mapped from its file where it lies outside the graph."""
    if not isinstance(constant._values, LazyValues):
        return np.frombuffer(np.ascontiguousarray(constant.values).tobytes(), np.uint8)
    tensor = constant._values.tensor
    if is_external(tensor):
        place = onnx.external_data_helper.ExternalDataInfo(tensor)
        length = place.length or math.prod(tensor.dims) * _bits(tensor.data_type) // 8
        return np.memmap(graph.root / place.location, np.uint8, "r", place.offset or 0, (length,))
    raw = tensor.raw_data or onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data
    return np.frombuffer(raw, np.uint8)


def read_array(graph: Graph, constant: gs.Constant, dtype: int) -> np.ndarray:
    """A constant's values, of a type of at least a byte, mapped from its file where it lies outside the graph."""
    values = read_bytes(graph, constant).view(onnx.helper.tensor_dtype_to_np_dtype(dtype))
    return values.reshape([int(size) for size in constant.shape])


def add_weight(graph: Graph, name: str, dtype: int, shape: list[int], slabs: Iterator[np.ndarray]) -> gs.Constant:
    """A new constant of this ONNX type and shape whose bytes are those of the slabs, one after the other."""
    tensor = TensorProto(name=graph.unique(name), data_type=dtype, dims=shape)
    if graph.weights_file is None or math.prod(shape) * _bits(dtype) // 8 <= INLINE:
        tensor.raw_data = b"".join(slab.tobytes() for slab in slabs)
    else:
        with open(graph.weights_file, "ab") as file:
            file.write(bytes(-file.tell() % ALIGNMENT))
            offset = file.tell()
            for slab in slabs:
                slab.tofile(file)
            length = file.tell() - offset
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", graph.weights_file.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    return gs.Constant(tensor.name, LazyValues(tensor))


def transposed(rows: np.ndarray) -> Iterator[np.ndarray]:
    """[N, M] as slabs of [M, N]."""
    step = max(SLAB // len(rows), 1)
    for start in range(0, rows.shape[1], step):
        yield np.ascontiguousarray(rows[:, start : start + step].T)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Bytes [..., M] as the two numbers that each holds, the low one first: [..., 2 M]."""
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def packed_nibbles(values: np.ndarray) -> np.ndarray:
    """Numbers of 4 bits, an even count of them, two to a byte: uint8 [count / 2]."""
    flat = values.reshape(-1)
    return flat[0::2] | (flat[1::2] << 4)


def _bits(dtype: int) -> int:
    return BITS.get(dtype) or onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize * 8
