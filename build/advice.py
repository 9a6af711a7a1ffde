"""What helps with a graph that TensorRT gets wrong: another stage's work, where it has not been done already."""

from dataclasses import replace

import onnx

from suture.build.audit import LOWER
from suture.core.findings import Finding
from suture.core.network.advice import advice

SURGERY = "suture.surgery"  # the producer that surgery writes into its graphs
LOWERED = "surgery has lowered this graph and knows no other form of it: change the source there"


def lowering_advice(proto: onnx.ModelProto) -> str:
    """To lower the graph, unless it is what surgery's lowering made."""
    ops = {node.op_type for node in proto.graph.node}
    lowered = proto.producer_name == SURGERY and ("Attention" not in ops or any(op.startswith("TRT_") for op in ops))
    return LOWERED if lowered else LOWER


def advised(findings: list[Finding], proto: onnx.ModelProto) -> list[Finding]:
    """The findings about `proto`, with no advice to do what was done."""
    return [replace(each, remedy=lowering_advice(proto)) if each.remedy == LOWER else each for each in findings]


def parser_advice(proto: onnx.ModelProto, operator: str, name: str, message: str) -> str:
    """For what TensorRT's parser said of the node called `name`."""
    node = next((node for node in proto.graph.node if node.name == name), None)
    return advice(node, operator, message) or lowering_advice(proto)
