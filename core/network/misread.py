"""Nodes and tensors that TensorRT's parser takes for something else than ONNX means, without a word: found by what they say.

docs/node_tests.md has the cases that show them.
"""

from collections.abc import Iterator

import onnx

from suture.core.findings import Finding
from suture.core.tensors import every_tensor, misplaced


def misread(model: onnx.ModelProto) -> Iterator[Finding]:
    for tensor in filter(misplaced, every_tensor(model)):
        what = "the parser reads its 8-bit values, which lie in int32_data, four times too far apart"
        yield Finding("error", f"tensor {tensor.name}", what, "store them as raw_data (surgery does)")
    for node in _nodes(model.graph):
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for severity, what, remedy in _of(node, given):
            name = node.name or f"node_of_{node.output[0]}"
            yield Finding(severity, f"{node.op_type} {name}", what, remedy)


def _of(node: onnx.NodeProto, given: dict) -> Iterator[tuple[str, str, str]]:
    kind = node.op_type
    if kind == "Trilu" and "upper" not in given:
        yield "error", "without `upper` the parser takes the lower triangle, ONNX the upper", "write upper=1"
    if kind == "Selu" and not {"alpha", "gamma"} <= given.keys():
        yield "warning", "without alpha and gamma the parser takes those of opset 1 (2e-5 off)", "write both"
    if kind == "SpaceToDepth" and given.get("mode") == b"CRD":
        yield "error", "the parser reads the mode CRD as DCR", "write it as Reshape, Transpose, Reshape"
    if kind in ("RNN", "GRU", "LSTM") and given.get("layout"):
        yield "error", "the parser ignores `layout`: it takes the batch for the sequence", "use layout 0 and Transpose"
    if kind == "Attention" and (windows := [key for key in given if "window" in key and given[key] not in (0, -1)]):
        yield "error", f"the parser ignores {', '.join(windows)}: it would attend to all", "give the window as a mask"
    if kind in ("Cast", "CastLike") and given.get("saturate") == 0:
        yield "warning", "the parser ignores saturate=0: what is out of range becomes the largest value", "leave it out"
    if kind == "ConvTranspose" and len(node.input) > 2 and any(given.get("output_padding", ())):
        added = given["output_padding"]
        ends = list(given.get("pads", [0] * 2 * len(added)))[len(added) :]
        if any(more > end for more, end in zip(added, ends)):
            what = "the parser fills output_padding beyond its pads with zeros, without the bias"
            yield "error", what, "write the bias as an Add behind it"
    if kind in ("MaxPool", "AveragePool") and given.get("ceil_mode"):
        what = "with ceil_mode the parser may keep a last window that starts beyond the input, which ONNX leaves out"
        yield "warning", what, "write pads instead of ceil_mode"


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)
