"""What would make an engine wrong or slow though TensorRT builds it.

Found in the ONNX graph, and in the network that the parser made of it.

An error stops the build, a warning does not, and a note asks for nothing. Each finding names the ONNX node or tensor and the remedy.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from suture.build.weights import Weight
from suture.core.errors import UserError
from suture.core.findings import Finding
from suture.core.signature import Signature
from suture.core.tensors import references
from suture.core.traits import STANDARD, named_input

LOWER = "lower the graph with surgery and build its model.trt.onnx"
STANDARD_DOMAINS = ("", "ai.onnx")
IMPORT_CONTRIB = "com.microsoft"  # a domain whose ops the parser does tell apart
MOVES = ("TensorScatter", "Concat", "Reshape", "Transpose", "Expand", "Cast", "Identity", "Unsqueeze", "Squeeze")


def stop_on_errors(model: object, findings: list[Finding]) -> None:
    """Raises UserError with the first error and the number of further ones."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more like it)" if len(errors) > 1 else ""
        raise UserError(model, f"{errors[0].where}: {errors[0].what}{more}", errors[0].remedy)


def audit_graph(proto: onnx.ModelProto, signature: Signature | None) -> list[Finding]:
    """What the ONNX graph alone shows."""
    pasts = {cache.past for cache in signature.caches} if signature else set()
    producers = {name: node for node in proto.graph.node for name in node.output}
    return [
        *_unused(proto),
        *(finding for node in proto.graph.node for finding in _causal_alignment(node, producers, pasts)),
        *(finding for node in proto.graph.node for finding in _mistaken_op(node)),
    ]


def audit_network(trt, network, proto: onnx.ModelProto, signature: Signature | None) -> list[Finding]:
    """What the parsed INetworkDefinition `network` of the graph `proto` shows."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    consumers = defaultdict(list)  # network tensor: layers
    for layer in layers:
        for tensor in _tensors(layer.get_input, layer.num_inputs):
            consumers[tensor.name].append(layer)
    users = defaultdict(list)  # ONNX tensor: nodes
    for node in proto.graph.node:
        for name in node.input:
            users[name].append(node)
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    findings = []
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        if name not in consumers and name not in outputs:
            findings.append(_dropped(f"input {name}", users[name]))
    for layer in layers:
        made = [tensor.name for tensor in _tensors(layer.get_output, layer.num_outputs)]
        if not any(name in consumers or name in outputs for name in made) and any(users[name] for name in made):
            findings.append(_dropped(f"node {layer.name}", users[made[0]]))
    return findings + _caches_in_place(trt, network, layers, consumers, outputs, signature)


def _caches_in_place(trt, network, layers, consumers, outputs, signature: Signature | None) -> list[Finding]:
    """A cache stays where it is if its update's input and output are the network's own, without anything between."""
    findings, inputs = [], {network.get_input(i).name for i in range(network.num_inputs)}
    for update in (layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE):
        past, present = update.get_input(0).name, update.get_output(0).name
        for name, ends, what in ((past, inputs, "reads no input"), (present, outputs, "writes no output")):
            if name not in ends:
                what = f"{what} of the network directly (but {name}), which TensorRT refuses"
                findings.append(Finding("error", f"cache update {update.name}", what, LOWER))
    for cache in signature.caches if signature and signature.static else ():
        if not findings and not any(layer.type == trt.LayerType.KV_CACHE_UPDATE for layer in consumers[cache.past]):
            what = "is not updated in place (by a TensorScatter) but copied at each step"
            findings.append(Finding("warning", f"cache {cache.past}", what, LOWER))
    return findings


def audit_bound_weights(proto: onnx.ModelProto, bound: list[Weight]) -> list[Finding]:
    """Matrices that stay constants of the engine though weights were to be its inputs."""
    names = {weight.name for weight in bound}
    return [
        Finding("warning", f"weight {tensor.name}", "stays a constant: no Gemm, MatMul or Gather takes it directly", LOWER)
        for tensor, _ in references(proto)
        if len(tensor.dims) >= 2 and tensor.name not in names
    ]


def audit_scales(proto: onnx.ModelProto, root: Path) -> list[Finding]:
    """Scales of 4-bit weights that are not above zero, as IDequantizeLayer asks them to be: the parser refuses such
    scales beside int8, and takes them here. `root`: the folder of the weights."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = []
    for node in proto.graph.node:
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
    return [Finding("warning", where, what, remedy)]


def _unused(proto: onnx.ModelProto) -> Iterator[Finding]:
    used = {name for node in proto.graph.node for name in node.input} | {value.name for value in proto.graph.output}
    used |= {name for node in proto.graph.node for name in _names_in_subgraphs(node)}
    weights = {tensor.name for tensor in proto.graph.initializer}
    for name in sorted(weights - used):
        yield Finding("error", f"weight {name}", "nothing in the graph uses it", "remove it, or mend what should")
    for value in proto.graph.input:
        if value.name not in used and value.name not in weights:
            yield Finding("error", f"input {value.name}", "nothing in the graph uses it", "export again without it")


def _causal_alignment(node: onnx.NodeProto, producers: dict, pasts: set[str]) -> Iterator[Finding]:
    if node.op_type == "TRT_Attention" and any(attribute.name == "causal_kind" for attribute in node.attribute):
        what = "its valid slots are given as lengths: some GPUs refuse it, some attend beyond them and say nothing"
        yield Finding("warning", f"Attention {node.name}", what, "lower the graph with surgery --attention mask")
    if node.op_type != "Attention":
        return
    if node.domain in STANDARD and (valid := named_input(node, "nonpad_kv_seqlen")):
        what = f"TensorRT's parser drops its nonpad_kv_seqlen ({valid})"
        yield Finding("error", f"Attention {node.name}", what, LOWER)
    causal = any(attribute.name == "is_causal" and attribute.i for attribute in node.attribute)
    if causal and _comes_from(node.input[1], pasts, producers):
        what = "is_causal over a cache: TensorRT aligns it to the first key, which is wrong for decoding"
        yield Finding("error", f"Attention {node.name}", what, LOWER)


def _mistaken_op(node: onnx.NodeProto) -> Iterator[Finding]:
    if node.domain not in (*STANDARD_DOMAINS, IMPORT_CONTRIB) and onnx.defs.has(node.op_type):
        what = f"TensorRT's parser ignores its domain and takes {node.domain}::{node.op_type} for ONNX's own"
        yield Finding("error", f"node {node.name or node.output[0]}", what, "replace it by standard ops")
    if node.domain == IMPORT_CONTRIB and node.op_type == "RotaryEmbedding":
        heads = next((attribute.i for attribute in node.attribute if attribute.name == "num_heads"), 0)
        if heads == 0:
            what = "RotaryEmbedding with num_heads=0 kills TensorRT's parser"
            yield Finding("error", f"node {node.name or node.output[0]}", what, LOWER)


def _comes_from(name: str, sources: set[str], producers: dict) -> bool:
    """Whether a tensor is one of `sources`, only moved and joined with others."""
    waiting, seen = [name], set()
    while waiting:
        name = waiting.pop()
        if name in sources:
            return True
        if name not in seen and name in producers and producers[name].op_type in MOVES:
            waiting.extend(producers[name].input)
        seen.add(name)
    return False


def _names_in_subgraphs(node: onnx.NodeProto) -> Iterator[str]:
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                yield from inner.input
                yield from _names_in_subgraphs(inner)


def _dropped(what: str, users: list[onnx.NodeProto]) -> Finding:
    """A tensor that ONNX nodes use and no layer of the network does."""
    if not users:
        return Finding("error", what, "nothing in the graph uses it", "export again without it")
    by = f"{users[0].op_type} {users[0].name}".strip()
    return Finding("error", what, f"TensorRT's parser drops it, though {by} uses it", LOWER)


def _tensors(get, count: int) -> list:
    return [tensor for tensor in map(get, range(count)) if tensor is not None]
