"""onnxruntime's EmbedLayerNormalization becomes the look-ups, their sum and a LayerNormalization.

EmbedLayerNormalization(ids, segments, words, positions, types, gamma, beta, mask, position_ids)
    →  LayerNormalization(words[ids] + positions[position_ids or 0, 1, 2, ...] + types[segments], gamma, beta)
its second output, each row's number of real tokens  →  sum(mask), int32 [B]
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, inputs_of, need, onnx_type, output_of, rank
from suture.surgery.masks.mask_builders import count_up, length_of
from suture.surgery.passes.import_contrib.nodes import contrib_nodes

EPSILON = 1e-12
INPUTS = ("input_ids", "segment_ids", "word_embedding", "position_embedding", "segment_embedding", "gamma", "beta", "mask",
          "position_ids")  # fmt: skip


def run(graph: Graph) -> int:
    return graph.match(_standard, contrib_nodes(graph, "EmbedLayerNormalization"))


def _standard(graph: Graph, node: gs.Node) -> bool:
    ids, segments, words, places, types, gamma, beta, mask, positions = inputs_of(node, *INPUTS)
    name, counts, total = node.name, output_of(node, "mask_index"), output_of(node, "embedding_sum")
    used = counts is not None and (counts.outputs or graph.is_output(counts))
    need(mask is not None or not used, "it counts tokens without a mask")
    there = all(tensor is not None for tensor in (words, places, gamma, beta))
    need(rank(ids) == 2 and there, "its inputs are not all there")
    dtype, width = onnx_type(words), words.shape[1]
    shape = [*ids.shape, width]
    summed = graph.new("Gather", [words, ids], {"axis": 0}, f"{name}/words", dtype, shape)
    if positions is None:
        positions = count_up(graph, length_of(graph, ids, 1, f"{name}/steps"), f"{name}/positions", ids.shape[1])
    looked = graph.new("Gather", [places, positions], {"axis": 0}, f"{name}/places", dtype, [*positions.shape, width])
    if segments is not None and types is not None:
        kinds = graph.new("Gather", [types, segments], {"axis": 0}, f"{name}/types", dtype, [*segments.shape, width])
        summed = graph.new("Add", [summed, kinds], name=f"{name}/typed", shape=shape)
    if total is not None:
        graph.replace(total, "Add", [summed, looked], name=f"{name}/sum")
    else:
        total = graph.new("Add", [summed, looked], name=f"{name}/sum", shape=shape)
    attrs = {"axis": -1, "epsilon": node.attrs.get("epsilon", EPSILON), "stash_type": 1}
    graph.replace(node.outputs[0], "LayerNormalization", [total, gamma, beta], attrs, name)
    if used:
        real = graph.new("Cast", [mask], {"to": onnx.TensorProto.INT32}, f"{name}/mask", np.int32, mask.shape)
        graph.replace(counts, "ReduceSum", [real, graph.int64([1])], {"keepdims": 0}, f"{name}/counts")
    return True
