"""A graph and the graphs inside its nodes: the branches of If, the bodies of Loop and Scan."""

from collections.abc import Iterator

import onnx


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those inside it, however deep."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Those of the node's attributes."""
    for attribute in node.attribute:
        yield from [attribute.g] * attribute.HasField("g") + list(attribute.graphs)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for each in all_graphs(graph):
        yield from each.node


def reads(node: onnx.NodeProto) -> set[str]:
    """The names that a node reads, and its subgraphs do from around them."""
    names = set(filter(None, node.input))
    for inner in subgraphs(node):
        names |= {name for each in inner.node for name in reads(each)} | {value.name for value in inner.output}
    return names
