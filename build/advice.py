"""What helps with a graph that TensorRT gets wrong: another stage's work, where it has not been done already."""

from dataclasses import replace

import onnx

from suture.core.findings import Finding
from suture.core.network.advice import LOWER, advice, lowering_advice


def advised(findings: list[Finding], proto: onnx.ModelProto) -> list[Finding]:
    """The findings about `proto`, with no advice to do what was done."""
    return [replace(each, remedy=lowering_advice(proto)) if each.remedy == LOWER else each for each in findings]


def parser_advice(proto: onnx.ModelProto, operator: str, name: str, message: str) -> str:
    """For what TensorRT's parser said of the node called `name`."""
    node = next((node for node in proto.graph.node if node.name == name), None)
    return advice(node, operator, message) or lowering_advice(proto)
