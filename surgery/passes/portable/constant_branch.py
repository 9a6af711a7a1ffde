"""Of an If whose condition is constant the branch that is taken stands in its place.

If(true, then, else)   →   then
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, input_of


def run(graph: Graph) -> int:
    return graph.match(_take, graph.nodes("If"))


def _take(graph: Graph, node: gs.Node) -> bool:
    condition = graph.scalar(input_of(node, "cond"))
    if condition is None:
        return False
    branch = node.attrs["then_branch" if condition else "else_branch"]
    made = {id(tensor): tensor for inner in branch.nodes for tensor in inner.outputs if not tensor.is_empty()}
    own = {id(tensor): tensor for inner in branch.nodes for tensor in inner.inputs if isinstance(tensor, gs.Constant)}
    for tensor in (*made.values(), *own.values()):
        tensor.name = graph.unique(tensor.name)
    for inner in list(branch.nodes):
        inner.name = graph.unique(inner.name or inner.op.lower())
        graph.gs.nodes.append(inner)
    results, node.inputs = list(node.outputs), []
    for result, tensor in zip(results, branch.outputs):
        result.inputs.clear()
        graph.redirect(result, tensor)
    return True
