"""What the parser dropped, retyped or will run slowly or refuse to build: found by reading the network beside its graph.

Each finding names the ONNX node and the remedy. An error is a network that computes something else than the graph, or
cannot be built; a warning is one that builds and pays for it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from suture.core.dtypes import BY_ONNX
from suture.core.findings import Finding
from suture.core.network.attentions import DTYPES, hindrance
from suture.core.network.description import Layer, Network
from suture.core.network.misread import misread
from suture.core.traits import STANDARD, named_input

FOLDED = ("Constant", "ConstantOfShape", "Identity", "Cast", "Shape", "If")  # nodes that may leave no layer of their own
SMALL = 64  # elements of a constant that may as well have become an attribute
HOLDERS = ("Conv", "ConvTranspose", "BatchNormalization")  # their layers hold weights themselves
MOVES = ("KV_CACHE_UPDATE", "CONCATENATION", "SHUFFLE", "UNSQUEEZE", "SQUEEZE", "SLICE", "CAST", "IDENTITY",
         "ELEMENTWISE")  # fmt: skip


@dataclass(frozen=True)
class NetworkFinding(Finding):
    """`kind`: "dropped" (no layer stands for it), "misread" (it means something else), "attention", or "cache"."""

    kind: str = ""


def audit(network: Network, model: onnx.ModelProto) -> list[NetworkFinding]:
    """All findings, errors first. `model` is the graph that `network` was parsed from."""
    producers = network.producers()
    live = _live(network, producers)
    lowered = any(node.op_type.startswith("TRT_") for node in model.graph.node)  # by surgery, or by another's hand
    masked = "give an explicit mask" if lowered else "lower the graph with surgery, or give an explicit mask"
    kinds = {
        "dropped": [
            *_dead_inputs(network, model, live),
            *_dead_initializers(network, model, live),
            *_lost_nodes(network, model),
            *_dropped_lengths(model, masked),
        ],
        "misread": [*_retyped(network, model), *_renamed(network, model), *misread(model)],
        "attention": [*_attentions(network, producers, masked)],
        "cache": [*_caches(network)],
    }
    findings = [NetworkFinding(**vars(finding), kind=kind) for kind, found in kinds.items() for finding in found]
    return sorted(findings, key=lambda finding: finding.severity)


def _live(network: Network, producers: dict[str, Layer]) -> set[str]:
    """The tensors that the network's outputs depend on."""
    conditions = {layer.attributes["conditional"]: layer.inputs for layer in network.layers if layer.type == "CONDITION"}
    waiting, live = list(network.outputs), set()
    while waiting:
        name = waiting.pop()
        if name in live:
            continue
        live.add(name)
        layer = producers.get(name)
        if layer is not None:
            waiting += [source for source in layer.inputs if source is not None]
            waiting += conditions.get(layer.attributes.get("conditional"), ())
    return live


def _dead_inputs(network: Network, model: onnx.ModelProto, live: set[str]) -> Iterator[Finding]:
    used = {name for node in _nodes(model.graph) for name in node.input}
    for name in network.inputs:
        if name not in live:
            reader = next((node for node in _nodes(model.graph) if name in node.input), None)
            if name in used:
                what = f"no output of the network depends on it: the parser dropped it from {_name(reader)}, or its result"
                yield Finding("error", f"input {name}", what, f"rewrite {_name(reader)} without it")
            else:
                yield Finding("error", f"input {name}", "nothing in the graph uses it", "export again without it")


def _dead_initializers(network: Network, model: onnx.ModelProto, live: set[str]) -> Iterator[Finding]:
    """A constant that a layer holds and nothing needs, and an initializer that a node takes and no layer holds."""
    constants = {layer.name for layer in network.layers if layer.type == "CONSTANT" and layer.outputs[0] in live}
    used_by = {name: node for node in _nodes(model.graph) for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name not in used_by:
            yield Finding("warning", f"initializer {tensor.name}", "nothing in the graph uses it", "remove it")
            continue
        reader = used_by[tensor.name]
        if math.prod(tensor.dims) > SMALL and tensor.name not in constants and reader.op_type not in HOLDERS:
            what = f"{_name(reader)} takes it, and no layer that the outputs depend on holds it"
            yield Finding("warning", f"initializer {tensor.name}", what, f"look at what became of {_name(reader)}")


def _lost_nodes(network: Network, model: onnx.ModelProto) -> Iterator[Finding]:
    """A node leaves a layer that names it, or a tensor of its output's name."""
    named = {layer.node for layer in network.layers}
    needed = {name for node in model.graph.node for name in node.input} | {out.name for out in model.graph.output}
    for node in model.graph.node:
        shown = node.name in named or _name(node) in named or any(name in network.tensors for name in node.output)
        if node.op_type not in FOLDED and not shown and any(name in needed for name in node.output):
            yield Finding(
                "warning", f"{node.op_type} {_name(node)}", "no layer of the network stems from it",
                "look whether the parser folded or dropped it",
            )  # fmt: skip


def _retyped(network: Network, model: onnx.ModelProto) -> Iterator[Finding]:
    """Tensors that ONNX types otherwise than the network. Types are inferred where the graph does not say them."""
    try:
        typed = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # custom operators, or a graph too large for one message: what the graph itself says
        typed = model.graph
    producer = {name: node for node in model.graph.node for name in node.output}
    for value in (*typed.value_info, *typed.input, *typed.output):
        known = BY_ONNX.get(value.type.tensor_type.elem_type)
        wanted = "DOUBLE" if known is BY_ONNX[onnx.TensorProto.DOUBLE] else known and known.tensorrt
        found = network.tensors.get(value.name)
        if wanted is not None and found is not None and found.dtype != wanted:
            node = producer.get(value.name)
            where = f"{node.op_type} {_name(node)}" if node is not None else f"tensor {value.name}"
            what = f"{value.name} is {wanted} in the graph and {found.dtype} in the network"
            severity = "warning" if (wanted, found.dtype) == ("DOUBLE", "FLOAT") else "error"  # TensorRT has no double
            yield Finding(severity, where, what, "write the Cast that is meant into the graph")


def _dropped_lengths(model: onnx.ModelProto, masked: str) -> Iterator[Finding]:
    for node in _nodes(model.graph):
        if node.op_type == "Attention" and node.domain in STANDARD and (valid := named_input(node, "nonpad_kv_seqlen")):
            yield Finding(
                "error", f"Attention {_name(node)}",
                f"the parser drops its nonpad_kv_seqlen ({valid}): it would attend to the whole "
                "cache",
                masked,
            )  # fmt: skip


def _renamed(network: Network, model: onnx.ModelProto) -> Iterator[Finding]:
    """The parser calls an input that a loop starts from as the loop's body does."""
    given = {value.name for value in model.graph.input}
    for name in network.inputs:
        if name not in given:
            what = "the network's input of this name has another in the graph"
            yield Finding("error", f"input {name}", what, "put an Identity between the input and the loop")


def _attentions(network: Network, producers: dict[str, Layer], masked: str) -> Iterator[Finding]:
    for layer in network.layers:
        if layer.type != "ATTENTION_INPUT":
            continue
        settings = layer.attributes["attention"]
        query, key = (network.tensors[name] for name in layer.inputs[:2])
        where = f"Attention {settings['name'] or layer.name}"
        tokens, slots = query.shape[2], key.shape[2]
        aligned = tokens == slots != -1  # then it does not matter which corner
        if settings["causal_kind"] == "UPPER_LEFT" and not aligned and _cached(network, producers, layer.inputs[1]):
            yield Finding(
                "error", where,
                f"is_causal aligns its first query ({_length(tokens)}) with its first key ({_length(slots)}), whatever is "
                "cached",
                masked,
            )  # fmt: skip
        without = hindrance(network, layer)
        if without and not settings["decomposable"]:
            what = f"no fused kernel for {without}, and it is not marked decomposable: it does not build"
            yield Finding("error", where, what, "mark it (TRT_decomposable=1), as surgery does, or use a form that is fused")
        elif without and query.dtype not in DTYPES:
            yield Finding("warning", where, f"{without} is decomposed", "use float16 or bfloat16 to have it fused")
        elif without:
            yield Finding("warning", where, f"no fused kernel for {without}: it is decomposed", "use another number of heads")
        if settings["causal_kind"] == "LOWER_RIGHT":
            yield Finding(
                "warning", where, "its valid slots are given as lengths, which TensorRT computes wrongly on some GPUs",
                "lower the graph with an explicit mask (surgery --attention mask)",
            )  # fmt: skip
        scaled = producers.get(layer.inputs[1])
        product = scaled is not None and scaled.type == "ELEMENTWISE" and scaled.attributes["op"] == "PROD"
        if product and _cached(network, producers, layer.inputs[1]):
            yield Finding(
                "warning", where, "the keys of the whole cache are scaled at each step",
                "scale the queries alone (TRT_Attention adds no scale)",
            )  # fmt: skip


def _cached(network: Network, producers: dict[str, Layer], name: str) -> bool:
    """True if a cache (a network input of floating type and four dimensions) is only moved on its way into `name`."""
    waiting, seen = [name], set()
    while waiting:
        name = waiting.pop()
        if name is None or name in seen:
            continue
        seen.add(name)
        tensor = network.tensors[name]
        if name in network.inputs and len(tensor.shape) == 4 and tensor.dtype in ("FLOAT", *DTYPES):
            return True
        if name in producers and producers[name].type in MOVES:
            waiting += producers[name].inputs
    return False


def _caches(network: Network) -> Iterator[Finding]:
    """The runtime binds a cache to one address as input and output, and TensorRT refuses anything in between."""
    for layer in network.layers:
        if layer.type != "KV_CACHE_UPDATE":
            continue
        past, present = layer.inputs[0], layer.outputs[0]
        if past not in network.inputs:
            what = f"its cache ({past}) is not directly a network input"
            yield Finding("error", f"TensorScatter {layer.node or layer.name}", what, "take out what is before it")
        if present not in network.outputs:
            what = f"its result ({present}) is not directly a network output"
            yield Finding("error", f"TensorScatter {layer.node or layer.name}", what, "take out what is after it")


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _name(node: onnx.NodeProto) -> str:
    """As the parser calls a node without a name."""
    return node.name or f"node_of_{node.output[0]}"


def _length(size: int) -> str:
    return "a dynamic number of them" if size == -1 else str(size)
