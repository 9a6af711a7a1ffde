"""Weights read a slab of rows at a time, so that memory does not grow with the model."""

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from onnx.external_data_helper import ExternalDataInfo

from suture.surgery.graph import Graph, is_weight_file, onnx_type
from suture.surgery.graph.weights import read_array
from suture.surgery.quantize.linears import Linear
from suture.surgery.quantize.rounding import from_numpy

SLAB = 1 << 18  # weights that are rounded at once: few enough to stay in a core's cache
ROWS = 1 << 21  # where each input is a step of its own: enough that a step is worth its call


def slabs(graph: Graph, weight: gs.Constant, by_output: bool = True, size: int = SLAB) -> Iterator[tuple[int, torch.Tensor]]:
    """First row and rows, float32 [≤ rows, in], of a weight that lies as [out, in], or as [in, out]. Each slab of the
    former is mapped alone, since the pages of a file that were read count as memory for as long as it is mapped."""
    outputs, features = (int(size) for size in (weight.shape if by_output else weight.shape[::-1]))
    step = max(size // features // 2, 1) * 2  # even: two 4-bit values share a byte
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        if by_output and is_weight_file(weight):
            yield start, from_numpy(_mapped(graph, weight, start, stop))
        else:
            whole = read_array(graph, weight, onnx_type(weight))
            yield start, from_numpy(whole[start:stop] if by_output else whole[:, start:stop].T)


def balanced_slabs(graph: Graph, linear: Linear) -> Iterator[tuple[int, torch.Tensor]]:
    """The same of a product's weight, as it will be rounded: times what balancing gave its inputs and outputs."""
    for start, rows in slabs(graph, linear.weight, linear.by_output, ROWS if linear.feedback else SLAB):
        if linear.columns is not None:
            rows *= linear.columns
        if linear.rows is not None:
            rows *= linear.rows[start : start + len(rows), None]
        yield start, rows


def _mapped(graph: Graph, weight: gs.Constant, start: int, stop: int) -> np.ndarray:
    place = ExternalDataInfo(weight._values.tensor)
    dtype, features = onnx.helper.tensor_dtype_to_np_dtype(onnx_type(weight)), int(weight.shape[1])
    offset = (place.offset or 0) + start * features * dtype.itemsize
    length = (stop - start) * features * dtype.itemsize
    data = np.memmap(graph.root / place.location, np.uint8, "r", offset, (length,))
    return data.view(dtype).reshape(stop - start, features)
