"""What the parser dropped, retyped or will run slowly or refuse to build: found by reading the network beside its graph.

Each finding names the ONNX node and the remedy. An error is a network that computes something else than the graph, or
cannot be built; a warning is one that builds and pays for it.
"""

import math
from collections import defaultdict
from collections.abc import Iterator

import onnx

from suture.core.dtypes import BY_ONNX
from suture.core.findings import Finding
from suture.core.network.advice import lowering_advice
from suture.core.network.attentions import DTYPES, hindrance
from suture.core.network.description import Layer, Network
from suture.core.network.graph_audit import node_name, unparsed_attention
from suture.core.signature import Signature
from suture.core.subgraphs import all_nodes

FOLDED = ("Constant", "ConstantOfShape", "Identity", "Cast", "Shape", "If")  # nodes that may leave no layer of their own
# Nodes that take shapes, axes or indices behind their first input, or there as well, which the parser may know already.
ALL_PARAMETERS = ("ConstantOfShape", "Range")
PARAMETERS = ("Reshape", "Expand", "Slice", "Tile", "Pad", "Resize", "Upsample", "Unsqueeze", "Squeeze", "ReduceSum", "ReduceMean",
              "ReduceMax", "ReduceMin", "ReduceProd", "TopK", "OneHot", "Split", "CumSum", *ALL_PARAMETERS)  # fmt: skip
SMALL = 64  # elements of a constant that may as well have become an attribute
HOLDERS = ("Conv", "ConvTranspose", "BatchNormalization")  # their layers hold weights themselves
MOVES = ("KV_CACHE_UPDATE", "CONCATENATION", "SHUFFLE", "UNSQUEEZE", "SQUEEZE", "SLICE", "CAST", "IDENTITY",
         "ELEMENTWISE")  # fmt: skip


def audit(network: Network, model: onnx.ModelProto, signature: Signature | None = None) -> list[Finding]:
    """All that the network shows, errors first. `model`: the graph that it was parsed from; `signature`: its own, where it is
    a decoder's."""
    producers = network.producers()
    live = _live(network, producers)
    findings = [
        *_dead_inputs(network, model, live),
        *_dead_layers(network, model),
        *_dead_initializers(network, model, live),
        *_lost_nodes(network, model),
        *_retyped(network, model),
        *_renamed(network, model),
        *_attentions(network, producers, unparsed_attention(model)),
        *_caches(network, signature, lowering_advice(model)),
    ]
    return sorted(findings, key=lambda finding: finding.severity)


def _live(network: Network, producers: dict[str, Layer]) -> set[str]:
    """The tensors that the network's outputs depend on."""
    conditions = {layer.attributes["conditional"]: layer.sources for layer in network.layers if layer.type == "CONDITION"}
    ends: dict[str, list[str]] = defaultdict(list)  # of loops, what says after how many rounds
    for layer in network.layers:
        if layer.type == "TRIP_LIMIT":
            ends[layer.attributes["loop"]] += layer.sources
    waiting, live = list(network.outputs), set()
    while waiting:
        name = waiting.pop()
        if name in live:
            continue
        live.add(name)
        if (made_by := producers.get(name)) is not None:
            waiting += made_by.sources
            waiting += conditions.get(made_by.attributes.get("conditional", ""), ())
            waiting += ends.get(made_by.attributes.get("loop", ""), ())
    return live


def _dead_inputs(network: Network, model: onnx.ModelProto, live: set[str]) -> Iterator[Finding]:
    """Inputs that the graph uses and the network does not. What the graph itself does not use, its own audit says."""
    for name in network.inputs:
        reader = next((node for node in all_nodes(model.graph) if name in node.input), None)
        if name not in live and reader is not None:
            what = f"no output of the network depends on it: the parser dropped it from {node_name(reader)}, or its result"
            yield Finding("error", f"input {name}", what, f"rewrite {node_name(reader)} without it", "dropped")


def _dead_layers(network: Network, model: onnx.ModelProto) -> Iterator[Finding]:
    """Layers whose results the graph's nodes use and no layer does. Shapes, axes and other parameters that the parser knew
    are not among them."""
    readers, users = network.consumers(), defaultdict(list)
    for node in all_nodes(model.graph):
        for place, name in enumerate(node.input):
            if node.op_type not in PARAMETERS or (place == 0 and node.op_type not in ALL_PARAMETERS):
                users[name].append(node)
    for layer in network.layers:
        dead = not any(readers[name] or name in network.outputs for name in layer.outputs)
        if layer.type != "CONSTANT" and dead and (user := next((each for name in layer.outputs for each in users[name]), None)):
            what = f"no layer takes it: the parser dropped it from {node_name(user)}"
            yield Finding(
                "error", f"{layer.type} {layer.node or layer.name}", what, f"rewrite {node_name(user)} without it", "dropped"
            )


def _dead_initializers(network: Network, model: onnx.ModelProto, live: set[str]) -> Iterator[Finding]:
    """A constant that a layer holds and nothing needs, and an initializer that a node takes and no layer holds."""
    constants = {layer.name for layer in network.layers if layer.type == "CONSTANT" and layer.outputs[0] in live}
    used_by = {name: node for node in all_nodes(model.graph) for name in node.input}
    for tensor in model.graph.initializer:
        reader = used_by.get(tensor.name)
        if reader is None:
            continue  # which the graph's own audit says
        if math.prod(tensor.dims) > SMALL and tensor.name not in constants and reader.op_type not in HOLDERS:
            what = f"{node_name(reader)} takes it, and no layer that the outputs depend on holds it"
            yield Finding(
                "warning", f"initializer {tensor.name}", what, f"look at what became of {node_name(reader)}", "dropped"
            )


def _lost_nodes(network: Network, model: onnx.ModelProto) -> Iterator[Finding]:
    """A node leaves a layer that names it, or a tensor of its output's name."""
    named = {layer.node for layer in network.layers}
    needed = {name for node in model.graph.node for name in node.input} | {out.name for out in model.graph.output}
    for node in model.graph.node:
        shown = node.name in named or node_name(node) in named or any(name in network.tensors for name in node.output)
        if node.op_type not in FOLDED and not shown and any(name in needed for name in node.output):
            yield Finding(
                "warning", f"{node.op_type} {node_name(node)}", "no layer of the network stems from it",
                "look whether the parser folded or dropped it", "dropped",
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
            where = f"{node.op_type} {node_name(node)}" if node is not None else f"tensor {value.name}"
            what = f"{value.name} is {wanted} in the graph and {found.dtype} in the network"
            severity = "warning" if (wanted, found.dtype) == ("DOUBLE", "FLOAT") else "error"  # TensorRT has no double
            yield Finding(severity, where, what, "write the Cast that is meant into the graph", "misread")


def _renamed(network: Network, model: onnx.ModelProto) -> Iterator[Finding]:
    """The parser calls an input that a loop starts from as the loop's body does."""
    given = {value.name for value in model.graph.input}
    for name in network.inputs:
        if name not in given:
            what = "the network's input of this name has another in the graph"
            yield Finding("error", f"input {name}", what, "put an Identity between the input and the loop", "misread")


def _attentions(network: Network, producers: dict[str, Layer], masked: str) -> Iterator[Finding]:
    for layer in network.layers:
        if layer.type != "ATTENTION_INPUT":
            continue
        settings = layer.attributes["attention"]
        query, key = (network.tensors[layer.source(place)] for place in (0, 1))
        where = f"Attention {settings['name'] or layer.name}"
        tokens, slots = query.shape[2], key.shape[2]
        aligned = tokens == slots != -1  # then it does not matter which corner
        if settings["causal_kind"] == "UPPER_LEFT" and not aligned and _cached(network, producers, layer.source(1)):
            yield Finding(
                "error", where,
                f"is_causal aligns its first query ({_length(tokens)}) with its first key ({_length(slots)}), whatever is "
                "cached",
                masked, "attention",
            )  # fmt: skip
        without = hindrance(network, layer)
        if without and not settings["decomposable"] and query.dtype == "FLOAT":
            what = f"{without} is decomposed, which it is not marked for: suture build marks it, and nothing else builds it"
            yield Finding("warning", where, what, "mark it (TRT_decomposable=1), as surgery does", "attention")
        elif without and not settings["decomposable"]:
            what = f"no fused kernel for {without}, and it is not marked decomposable: it does not build"
            yield Finding(
                "error", where, what, "mark it (TRT_decomposable=1), as surgery does, or use a form that is fused", "attention"
            )
        elif without and query.dtype not in DTYPES:
            yield Finding("warning", where, f"{without} is decomposed", "use float16 or bfloat16 to have it fused", "attention")
        elif without:
            yield Finding(
                "warning", where, f"no fused kernel for {without}: it is decomposed", "use another number of heads", "attention"
            )
        if settings["causal_kind"] == "LOWER_RIGHT":
            yield Finding(
                "warning", where, "its valid slots are given as lengths, which TensorRT computes wrongly on some GPUs",
                "lower the graph with an explicit mask (surgery --attention mask)", "attention",
            )  # fmt: skip
        scaled = producers.get(layer.source(1))
        product = scaled is not None and scaled.type == "ELEMENTWISE" and scaled.attributes["op"] == "PROD"
        if product and _cached(network, producers, layer.source(1)):
            yield Finding(
                "warning", where, "the keys of the whole cache are scaled at each step",
                "scale the queries alone (TRT_Attention adds no scale)", "attention",
            )  # fmt: skip


def _cached(network: Network, producers: dict[str, Layer], name: str) -> bool:
    """True if a cache (a network input of floating type and four dimensions) is only moved on its way into `name`."""
    waiting, seen = [name], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        tensor = network.tensors[name]
        if name in network.inputs and len(tensor.shape) == 4 and tensor.dtype in ("FLOAT", *DTYPES):
            return True
        if name in producers and producers[name].type in MOVES:
            waiting += producers[name].sources
    return False


def _caches(network: Network, signature: Signature | None, lower: str) -> Iterator[Finding]:
    """The runtime binds a cache to one address as input and output, and TensorRT refuses anything in between."""
    updates = [layer for layer in network.layers if layer.type == "KV_CACHE_UPDATE"]
    for layer in updates:
        past, present, where = layer.source(), layer.outputs[0], f"TensorScatter {layer.node or layer.name}"
        if past not in network.inputs:
            what = f"its cache ({past}) is not directly a network input"
            yield Finding("error", where, what, "take out what is before it", "cache")
        if present not in network.outputs:
            what = f"its result ({present}) is not directly a network output"
            yield Finding("error", where, what, "take out what is after it", "cache")
    written = {layer.source() for layer in updates}
    for cache in signature.caches if signature is not None and signature.static and written <= set(network.inputs) else ():
        if cache.past not in written:
            what = "is not updated in place (by a TensorScatter) but copied at each step"
            yield Finding("warning", f"cache {cache.past}", what, lower, "cache")


def _length(size: int) -> str:
    return "a dynamic number of them" if size == -1 else str(size)
