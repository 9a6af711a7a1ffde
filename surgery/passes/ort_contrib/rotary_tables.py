"""The rotary tables of all positions, worked out of what a graph computes for the positions of a step."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from suture.core.step_inputs import token_values
from suture.surgery.graph import Graph, need, onnx_type, static_dim
from suture.surgery.masks.mask_probe import evaluate

Tables = tuple[gs.Constant, gs.Constant]


def rotary_tables(graph: Graph, query: gs.Node, key: gs.Node, slots: int, known: dict[tuple[int, ...], Tables]) -> Tables:
    """cos and sin, each [slots, D/2] in the query's type, if both RotaryEmbeddings rotate by the same angles, and those
    depend on the position alone. `known`: what was made before, by the ids of the tensors that it was made from."""
    for node in (query, key):
        need(len(node.inputs) == 3 and not node.attrs.get("rotary_embedding_dim", 0), "it is not rotated by tables of a step")
    need(query.attrs.get("interleaved", 0) == key.attrs.get("interleaved", 0), "query and key are rotated in different ways")
    tensors = [*query.inputs[1:], *key.inputs[1:]]
    ids = tuple(map(id, tensors))
    if ids not in known:
        cos, sin = _of_all_positions(graph, tensors, slots)
        head_dim, angles = static_dim(query.inputs[0], 3), cos.shape[1]
        need(head_dim % 16 == 0 and angles % 8 == 0, f"onnxruntime rotates no head_dim of {head_dim} by {angles} angles")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx_type(query.inputs[1]))
        known[ids] = tuple(
            gs.Constant(graph.unique(f"rotary/{name}"), LazyValues(onnx.numpy_helper.from_array(table.astype(dtype))))
            for name, table in (("cos", cos), ("sin", sin))
        )
    return known[ids]


def _of_all_positions(graph: Graph, tensors: list[gs.Tensor], slots: int) -> tuple[np.ndarray, np.ndarray]:
    trained = graph.signature.ntk_trained_length or slots
    need(slots <= trained, f"from {trained:,} tokens on the rotary tables depend on the prompt")
    tables = _at(graph, tensors, 0, slots)
    for start, stop in ((1, slots), (0, slots // 2)):
        part = zip(tables, _at(graph, tensors, start, stop))
        need(
            all(np.array_equal(table[start:stop], own) for table, own in part), "its rotary tables are not the position's alone"
        )
    cos, sin, *keys = tables
    need(np.array_equal(cos, keys[0]) and np.array_equal(sin, keys[1]), "query and key are rotated by different tables")
    return cos, sin


def _at(graph: Graph, tensors: list[gs.Tensor], start: int, stop: int) -> list[np.ndarray]:
    """The tables of a step whose tokens have the positions from `start` to `stop`, each [stop - start, D/2]."""
    names, steps = graph.signature, stop - start
    feeds = {
        names.tokens: token_values(names, np.zeros((1, steps), np.int64)),
        names.positions: np.arange(start, stop)[None],
        names.write_indices: np.array([start]),
        names.ntk_alpha: np.ones(1, np.float32),
    }
    values = evaluate(graph, tensors, feeds)
    need(values is not None, "what its rotary tables are could not be worked out")
    return [table.reshape(steps, -1) for table in values]
