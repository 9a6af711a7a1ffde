"""All ranks side by side in one standard graph, with a Sum in the place of each collective: it computes what the ranks do together,
wherever ONNX runs, and has the inputs and outputs of the graph that was divided.

y = Σ over ranks x[:, part] · W[part, :]
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, files
from suture.surgery.parallel.division import Division
from suture.surgery.parallel.pieces import Cuts, Pieces
from suture.surgery.parallel.placement import Placement
from suture.surgery.parallel.rank_graph import take_bias
from suture.surgery.parallel.relations import Placements

Parts = dict[str, list[gs.Variable]]  # by tensor, each rank's


def joint_graph(graph: Graph, division: Division, cuts: Cuts) -> Graph:
    joint = files.reread(graph)
    joint.metadata = dict(graph.metadata)
    files.sort(joint)
    tensors = joint.gs.tensors()
    parts = {name: [_part(joint, tensors[name], placement, rank) for rank in range(division.ranks)]
             for name, placement in division.placements.items()}  # fmt: skip
    pieces = [Pieces(joint, rank, division.ranks, cuts) for rank in range(division.ranks)]
    for node in list(joint.gs.nodes):
        name = node.outputs[0].name
        if name not in division.nodes:
            continue
        if name in division.sums:
            _sum(joint, node, division, parts, pieces)
        else:
            outputs = list(node.outputs)
            for each in pieces:
                _copy(
                    joint,
                    node,
                    division.nodes[name],
                    parts,
                    each,
                    [_own(joint, output, parts, each.rank) for output in outputs],
                )
            node.outputs.clear()
    for tensor in joint.gs.inputs:
        if tensor.name in division.placements:
            _split(joint, tensor, division.placements[tensor.name], parts[tensor.name])
    for tensor in joint.gs.outputs:
        if tensor.name in division.placements:
            _join(joint, tensor, division.placements[tensor.name], parts[tensor.name])
    files.remove_unused(joint)
    files.sort(joint)
    return joint


def _part(graph: Graph, tensor: gs.Variable, placement: Placement, rank: int) -> gs.Variable:
    shape = [placement.local if axis == placement.axis else size for axis, size in enumerate(tensor.shape or [])]
    return gs.Variable(graph.unique(f"{tensor.name}/rank{rank}"), tensor.dtype, shape or None)


def _own(graph: Graph, output: gs.Variable, parts: Parts, rank: int) -> gs.Variable:
    """A rank's; of what all have whole, the first rank's is read."""
    if output.name in parts:
        return parts[output.name][rank]
    return output if rank == 0 else gs.Variable(graph.unique(f"{output.name}/rank{rank}"), output.dtype, output.shape)


def _copy(
    graph: Graph, node: gs.Node, placements: Placements, parts: Parts, pieces: Pieces, outputs: list[gs.Variable]
) -> None:
    """The node as one rank has it."""
    name, attributes = f"{node.name}/rank{pieces.rank}", dict(node.attrs)
    copy = gs.Node(node.op, name, attributes, list(node.inputs), list(node.outputs), domain=node.domain)
    pieces.tell(copy, placements)
    copy.inputs = [_input(tensor, placements, parts, pieces) for tensor in copy.inputs]
    copy.outputs = outputs
    graph.gs.nodes.append(copy)


def _input(tensor: gs.Tensor, placements: Placements, parts: Parts, pieces: Pieces) -> gs.Tensor:
    if isinstance(tensor, gs.Constant):
        return pieces.constant(tensor, placements[tensor.name]) if tensor.name in placements else tensor
    return parts[tensor.name][pieces.rank] if tensor.name in parts else tensor


def _sum(graph: Graph, node: gs.Node, division: Division, parts: Parts, pieces: list[Pieces]) -> None:
    y, placements = node.outputs[0], division.nodes[node.outputs[0].name]
    bias = take_bias(node)
    results = []
    for each in pieces:
        partial = gs.Variable(graph.unique(f"{y.name}/rank{each.rank}"), y.dtype, y.shape)
        inputs = [_input(tensor, placements, parts, each) for tensor in node.inputs]
        graph.gs.nodes.append(gs.Node(node.op, f"{node.name}/rank{each.rank}", dict(node.attrs), inputs, [partial]))
        results.append(partial)
    node.inputs.clear()
    node.outputs.clear()
    total = y if bias is None else gs.Variable(graph.unique(f"{y.name}/sum"), y.dtype, y.shape)
    graph.gs.nodes.append(gs.Node("Sum", f"{node.name}/sum", {}, results, [total]))
    if bias is not None:
        graph.gs.nodes.append(gs.Node("Add", f"{node.name}/bias", {}, [total, bias], [y]))


def _split(graph: Graph, tensor: gs.Variable, placement: Placement, parts: list[gs.Variable]) -> None:
    """A cache's pieces for those ranks that have them."""
    for rank, part in enumerate(parts):
        ((start, end),) = placement.spans(rank, len(parts))
        bounds = [graph.int64([bound], f"{part.name}/{name}") for name, bound in (("start", start), ("end", end))]
        inputs = [tensor, *bounds, graph.int64([placement.axis], f"{part.name}/axis")]
        graph.gs.nodes.append(gs.Node("Slice", part.name, {}, inputs, [part]))


def _join(graph: Graph, tensor: gs.Variable, placement: Placement, parts: list[gs.Variable]) -> None:
    """Of all ranks that have the same piece the first one's."""
    pieces: dict[tuple, gs.Variable] = {}
    for rank, part in enumerate(parts):
        pieces.setdefault(tuple(placement.spans(rank, len(parts))), part)
    tensor.inputs.clear()
    graph.gs.nodes.append(gs.Node("Concat", tensor.name, {"axis": placement.axis}, list(pieces.values()), [tensor]))
