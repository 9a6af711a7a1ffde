"""The graph of one rank: its parts of weights and caches, and a DistCollective where the ranks' results are added up.

y = x · W + b  →  y = all_reduce(x[:, part] · W[part, :]) + b

The bias is added once, behind the sum. All ranks' graphs have the same nodes.
"""

from dataclasses import replace

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, files
from suture.surgery.parallel.division import Division
from suture.surgery.parallel.pieces import Cuts, Pieces

DOMAIN = "trt"  # any would do for TensorRT's parser; onnx's checker takes none of the standard's
COLLECTIVE = "DistCollective"


def rank_graph(graph: Graph, division: Division, rank: int, cuts: Cuts) -> Graph:
    """A graph of its own for `rank`, of which pieces of weights lie in the file that the graph adds weights to, and in `cuts`."""
    own = files.reread(graph)
    own.metadata = dict(graph.metadata)
    pieces = Pieces(own, rank, division.ranks, cuts)
    for node in list(own.gs.nodes):
        name = node.outputs[0].name
        placements = division.nodes.get(name)
        if placements is None:
            continue
        pieces.tell(node, placements)
        node.inputs = [
            pieces.constant(tensor, placements[tensor.name])
            if isinstance(tensor, gs.Constant) and tensor.name in placements
            else tensor
            for tensor in node.inputs
        ]
        if name in division.sums:
            _sum(own, node, division.ranks)
    for tensor in own.gs.tensors().values():
        if tensor.name in division.placements:
            placement = division.placements[tensor.name]
            tensor.shape = [placement.local if axis == placement.axis else size for axis, size in enumerate(tensor.shape)]
    caches = {cache.past for cache in own.signature.caches} & set(division.placements)
    if caches:
        local = {division.placements[name].local for name in caches}
        own.signature = replace(own.signature, kv_heads=local.pop())
    files.remove_unused(own)
    files.sort(own)
    return own


def _sum(graph: Graph, product: gs.Node, ranks: int) -> None:
    y = product.outputs[0]
    partial = gs.Variable(graph.unique(f"{y.name}/part"), y.dtype, y.shape)
    bias = take_bias(product)
    product.outputs = [partial]
    total = y if bias is None else gs.Variable(graph.unique(f"{y.name}/sum"), y.dtype, y.shape)
    attributes = {"collective_operation": "all_reduce", "reduce_op": "sum", "root": -1, "nb_rank": ranks, "group_size": 0}
    graph.gs.nodes.append(gs.Node(COLLECTIVE, f"{product.name}/sum", attributes, [partial], [total], domain=DOMAIN))
    if bias is not None:
        graph.gs.nodes.append(gs.Node("Add", f"{product.name}/bias", {}, [total, bias], [y]))


def take_bias(product: gs.Node) -> gs.Tensor | None:
    """Takes a Gemm's bias away."""
    if len(product.inputs) < 3 or product.inputs[2].is_empty():
        return None
    bias = product.inputs[2]
    product.inputs = product.inputs[:2]
    return bias
