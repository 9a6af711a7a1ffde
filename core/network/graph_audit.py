"""What an ONNX graph alone shows that TensorRT would get wrong, before its parser reads it.

The parser silently reads some nodes and tensors otherwise than ONNX means them. docs/node_tests.md
has the cases that show them.
"""

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from suture.core.findings import Finding
from suture.core.network.advice import lowering_advice
from suture.core.signature import WANTS_FLOAT32, Signature
from suture.core.subgraphs import all_nodes
from suture.core.tensors import every_tensor, misplaced
from suture.core.traits import MICROSOFT, STANDARD, named_input


def audit_graph(model: onnx.ModelProto, root: Path, signature: Signature | None = None) -> list[Finding]:
    """`root`: the folder that external weights lie under. `signature`: of a decoder with caches."""
    return [
        *_unused(model, signature is not None),
        *_dropped_lengths(model),
        *_misread(model),
        *_mistaken(model),
        *_scales(model, root),
        *_too_wide(model),
    ]


def unparsed_attention(model: onnx.ModelProto) -> str:
    """What helps with an Attention that the parser reads otherwise than ONNX does."""
    lowered = any(node.op_type.startswith("TRT_") for node in model.graph.node)  # by surgery, or by another's hand
    return "give an explicit mask" if lowered else "lower the graph with surgery, or give an explicit mask"


def node_name(node: onnx.NodeProto) -> str:
    """As the parser calls a node without a name."""
    return node.name or f"node_of_{node.output[0]}"


def _unused(model: onnx.ModelProto, decoder: bool) -> Iterator[Finding]:
    """A weight that nothing uses is harmless, an input is one that the network's caller must bind for nothing: of a decoder
    the sign of an export that lost a mask or a length, of any other graph a part of its interface."""
    weights = {tensor.name for tensor in model.graph.initializer}
    used = {name for node in all_nodes(model.graph) for name in node.input} | {value.name for value in model.graph.output}
    for name in sorted(weights - used):
        yield Finding("warning", f"weight {name}", "nothing in the graph uses it", "remove or use it", "dropped")
    for value in model.graph.input:
        if value.name not in used | weights:
            severity = "error" if decoder else "warning"
            yield Finding(severity, f"input {value.name}", "nothing in the graph uses it", "export again without it", "dropped")


def _too_wide(model: onnx.ModelProto) -> Iterator[Finding]:
    """Random weights do not show it, and no comparison of graphs does: both overflow alike."""
    halves = any(value.type.tensor_type.elem_type == TensorProto.FLOAT16 for value in model.graph.output)
    if halves and any(each.key == WANTS_FLOAT32 for each in model.metadata_props):
        what = "the checkpoint's config.json (force_upcast) says that its numbers pass 65,504, what float16 holds"
        yield Finding("warning", "the graph", what, "export this part with --dtype float32 or bfloat16", "overflow")


def _dropped_lengths(model: onnx.ModelProto) -> Iterator[Finding]:
    for node in all_nodes(model.graph):
        if node.op_type == "Attention" and node.domain in STANDARD and (valid := named_input(node, "nonpad_kv_seqlen")):
            what = f"the parser drops its nonpad_kv_seqlen ({valid}): it would attend to the whole cache"
            yield Finding("error", f"Attention {node_name(node)}", what, unparsed_attention(model), "dropped")


def _mistaken(model: onnx.ModelProto) -> Iterator[Finding]:
    """The parser looks up an operator without its domain, and crashes on one contrib operator."""
    for node in all_nodes(model.graph):
        where = f"node {node_name(node)}"
        if node.domain not in (*STANDARD, MICROSOFT) and onnx.defs.has(node.op_type):
            what = f"TensorRT's parser ignores its domain and takes {node.domain}::{node.op_type} for ONNX's own"
            yield Finding("error", where, what, "replace it by standard ops", "misread")
        heads = next((attribute.i for attribute in node.attribute if attribute.name == "num_heads"), 0)
        if node.domain == MICROSOFT and node.op_type == "RotaryEmbedding" and heads == 0:
            what = "RotaryEmbedding with num_heads=0 kills TensorRT's parser"
            yield Finding("error", where, what, lowering_advice(model), "misread")


def _scales(model: onnx.ModelProto, root: Path) -> list[Finding]:
    """Scales of 4-bit weights that are not above zero, as IDequantizeLayer asks them to be: the parser refuses such
    scales beside int8, and takes them here."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        weight, scale = (tensors.get(name) for name in (*node.input, "", "")[:2])
        if (
            node.op_type == "DequantizeLinear"
            and weight is not None
            and weight.data_type == TensorProto.INT4
            and scale is not None
        ):
            values = numpy_helper.to_array(TensorProto.FromString(scale.SerializeToString()), str(root))
            if not (values > 0).all():
                found.append(scale.name)
    if not found:
        return []
    where = f"scales {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
    what = "some are not above zero, which TensorRT's reference asks of them and its parser does not check beside int4"
    remedy = "compare the engine's numbers with validate, or quantise with scales above zero, as surgery --quantize does"
    return [Finding("warning", where, what, remedy, "weights")]


def _misread(model: onnx.ModelProto) -> Iterator[Finding]:
    for tensor in filter(misplaced, every_tensor(model)):
        what = "the parser reads its 8-bit values, which lie in int32_data, four times too far apart"
        yield Finding("error", f"tensor {tensor.name}", what, "store them as raw_data (surgery does)", "misread")
    for node in all_nodes(model.graph):
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for severity, what, remedy in _of(node, given):
            yield Finding(severity, f"{node.op_type} {node_name(node)}", what, remedy, "misread")


def _of(node: onnx.NodeProto, given: dict) -> Iterator[tuple[str, str, str]]:
    kind = node.op_type
    if kind == "Trilu" and "upper" not in given:
        yield "error", "without `upper` the parser takes the lower triangle, ONNX the upper", "write upper=1 (surgery does)"
    if kind == "Selu" and not {"alpha", "gamma"} <= given.keys():
        yield "warning", "without alpha and gamma the parser takes those of opset 1 (2e-5 off)", "write both (surgery does)"
    if kind == "SpaceToDepth" and given.get("mode") == b"CRD":
        yield "error", "the parser reads the mode CRD as DCR", "write it as Reshape, Transpose, Reshape"
    if kind == "GroupNormalization" and given.get("num_groups") == 1:
        yield (
            "error",
            "the parser takes one group for InstanceNormalization",
            "normalise with LayerNormalization (surgery does)",
        )
    if kind in ("RNN", "GRU", "LSTM") and given.get("layout"):
        yield "error", "the parser ignores `layout`: it takes the batch for the sequence", "use layout 0 and Transpose"
    if kind == "Attention" and (windows := [key for key in given if "window" in key and given[key] not in (0, -1)]):
        yield "error", f"the parser ignores {', '.join(windows)}: it would attend to all", "give the window as a mask"
    if kind == "MultiHeadAttention" and node.domain == MICROSOFT and given.get("unidirectional"):
        what = "of more keys than queries the parser hides some from the last query, which onnxruntime does not"
        yield "warning", what, "give the mask that is meant"
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
