"""Runs a graph in onnxruntime layer by layer, the weights of one layer mapped at a time: for models larger than memory.

A node belongs to the layer of the last cache that it follows from: what comes before all caches is the first part, what
follows layer i's cache and precedes layer i + 1's comes next, in several parts where its weights are many. A part's
session lives for one step, so that memory holds the part's weights (as float32, where the processor computes in that),
a layer's cache, and what passes between parts.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from suture.core.cpm_inputs import set_places
from suture.core.sessions import new_session
from suture.core.signature import find_signature
from suture.core.tensors import external, references, tensor_bytes

LARGE = 4_000_000_000  # bytes of weights from which a graph runs this way
MOST_WEIGHTS = 256_000_000  # bytes of weights in one part; a product with a larger one is taken by rows
SLOTS = 64  # of each static cache: the rest of its capacity is never reached here


@dataclass(frozen=True)
class GraphValue:
    """An input or output of the whole graph: sizes are numbers, or names where they are open."""

    name: str
    shape: list[int | str]


@dataclass
class LayerwisePart:
    nodes: list[onnx.NodeProto]
    inputs: list[str]
    outputs: list[str]


class LayerwiseSession:
    """The part of onnxruntime.InferenceSession that who steps a graph uses."""

    def __init__(self, model: onnx.ModelProto, root: Path):
        self.model, self.root = model, root
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.parts = split(model)

    def get_inputs(self) -> list[GraphValue]:
        return [
            GraphValue(value.name, _sizes(value)) for value in self.model.graph.input if value.name not in self.initializers
        ]

    def get_outputs(self) -> list[GraphValue]:
        return [GraphValue(value.name, _sizes(value)) for value in self.model.graph.output]

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        values = dict(feeds)
        results: dict[str, np.ndarray] = {}
        for index, part in enumerate(self.parts):
            computed = self._open(part, values).run(part.outputs, {name: values[name] for name in part.inputs})
            found = dict(zip(part.outputs, computed))
            results |= {name: found[name] for name in names if name in found}
            values |= found
            still = {name for later in self.parts[index + 1 :] for name in later.inputs}
            values = {name: value for name, value in values.items() if name in still}
        return [results[name] for name in names]

    def _open(self, part: LayerwisePart, values: dict[str, np.ndarray]) -> ort.InferenceSession:
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values[name].dtype), [None] * values[name].ndim)
            for name in part.inputs
        ]
        used = dict.fromkeys(name for node in part.nodes for name in _reads(node) if name in self.initializers)
        graph = helper.make_graph(
            part.nodes,
            "part",
            inputs,
            [onnx.ValueInfoProto(name=name) for name in part.outputs],
            [self.initializers[name] for name in used],
        )
        model = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        model.functions.extend(self.model.functions)
        return new_session(model, self.root, mapped=True, without=["ConstantFolding"])  # a float32 copy of each bfloat16 weight


def is_large(model: onnx.ModelProto) -> bool:
    return sum(tensor_bytes(tensor) for tensor, _ in references(model)) >= LARGE


def split(model: onnx.ModelProto) -> list[LayerwisePart]:
    """The graph's nodes by layer, in order, and again where a layer's weights are many; with what each part takes from
    those before it and gives to those behind."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input} - set(initializers)
    caches = find_signature(model, need_caches=False).caches  # an encoder has none
    depth = dict.fromkeys(inputs, 0) | {cache.past: 1 + cache.layer for cache in caches}
    weighed: dict[str, onnx.NodeProto] = {}  # by what they make: nodes that compute with weights alone
    layers: dict[int, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        above = [depth[name] for name in _reads(node) if name in depth]
        level = 0 if node.op_type == "Shape" and node.input[0] in inputs else max(above, default=0)
        if above:
            depth |= dict.fromkeys(node.output, level)
            layers.setdefault(level, []).append(node)
        else:
            weighed |= dict.fromkeys(node.output, node)
    parts: list[list[onnx.NodeProto]] = []
    for level in sorted(layers):
        parts.append([])
        size = 0
        for node in layers[level]:
            group = [*_made_of_weights(node, weighed), node]
            read = [name for each in group if each.op_type != "Gather" for name in _reads(each)]  # that reads a few rows
            added = sum(tensor_bytes(initializers[name]) for name in read if name in initializers)
            if size and size + added > MOST_WEIGHTS:
                parts.append([])
                size = 0
            parts[-1] += group
            size += added
    return _joined(parts, set(initializers), [value.name for value in model.graph.output])


def _made_of_weights(node: onnx.NodeProto, weighed: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """What must be computed of weights alone for `node`, and was for none before it; in order."""
    found = []
    for name in _reads(node):
        if above := weighed.get(name):
            for made in above.output:
                weighed.pop(made, None)
            found += [*_made_of_weights(above, weighed), above]
    return found


def _joined(parts: list[list[onnx.NodeProto]], initializers: set[str], outputs: list[str]) -> list[LayerwisePart]:
    made = [{name for node in nodes for name in node.output if name} for nodes in parts]
    read = [dict.fromkeys(name for node in nodes for name in _reads(node)) for nodes in parts]
    wanted = [{*outputs, *(name for later in read[index + 1 :] for name in later)} for index in range(len(parts))]
    return [
        LayerwisePart(
            nodes,
            [name for name in read[index] if name not in made[index] and name not in initializers],
            sorted(made[index] & wanted[index]),
        )
        for index, nodes in enumerate(parts)
    ]


def _reads(node: onnx.NodeProto) -> list[str]:
    """All tensors that a node takes, those that its subgraphs take from around them among them."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            made = {name for inner in attribute.g.node for name in inner.output}
            names += [name for inner in attribute.g.node for name in _reads(inner) if name not in made]
    return names


def with_fewer_slots(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph over static caches of at most SLOTS slots; nothing but the caches' shapes says how many there are."""
    signature = find_signature(model)
    if signature.capacity is None or signature.capacity <= SLOTS:
        return model
    smaller = onnx.ModelProto.FromString(model.SerializeToString())
    names = {name for cache in signature.caches for name in (cache.past, cache.present)}
    set_places(smaller.graph.input, SLOTS)
    for value in (*smaller.graph.input, *smaller.graph.output):
        if value.name in names:
            value.type.tensor_type.shape.dim[2].dim_value = SLOTS
    return smaller


def with_products_by_rows(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with products of large weights taken by rows, [y1, y2, ...] = [x W1ᵀ, x W2ᵀ, ...], for a Gemm
    without bias whose weight is [out, in], and for a MatMul with such a weight transposed."""
    by_rows = onnx.ModelProto.FromString(model.SerializeToString())
    graph = by_rows.graph
    large = {t.name: (t, place) for t, place in external(by_rows.graph.initializer) if tensor_bytes(t) > MOST_WEIGHTS}
    transposed = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in large}
    nodes: list[onnx.NodeProto] = []
    parts: dict[str, TensorProto] = {}
    for node in graph.node:
        weight = _weight_of(node, large, transposed)
        nodes += _products(node, *large[weight], parts) if weight else [node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(parts.values())
    return by_rows


def _weight_of(node: onnx.NodeProto, large: dict, transposed: dict[str, str]) -> str | None:
    if node.op_type == "MatMul":
        return transposed.get(node.input[1])
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    plain = node.op_type == "Gemm" and attributes == {"transB": 1} and len(node.input) == 2
    return node.input[1] if plain and node.input[1] in large else None


def _products(node: onnx.NodeProto, tensor: TensorProto, place: dict, known: dict[str, TensorProto]) -> list[onnx.NodeProto]:
    """Puts the parts of the weight into `known`, by name: another product may have them, too."""
    rows, length = tensor.dims[0], tensor_bytes(tensor)
    step = math.ceil(rows / math.ceil(length / MOST_WEIGHTS))
    nodes, parts = [], []
    for start in range(0, rows, step):
        count = min(step, rows - start)
        name = f"{tensor.name}.rows{start}"
        part = TensorProto(name=name, data_type=tensor.data_type, dims=[count, *tensor.dims[1:]])
        part.data_location = TensorProto.EXTERNAL
        offset = int(place.get("offset", 0)) + length // rows * start
        for key, value in {**place, "offset": offset, "length": length // rows * count}.items():
            part.external_data.add(key=key, value=str(value))
        known.setdefault(name, part)
        output = f"{node.output[0]}.rows{start}"
        if node.op_type == "MatMul":
            nodes.append(helper.make_node("Transpose", [name], [f"{output}.weight"], perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", [node.input[0], f"{output}.weight"], [output]))
        else:
            nodes.append(helper.make_node("Gemm", [node.input[0], name], [output], transB=1))
        parts.append(output)
    return [*nodes, helper.make_node("Concat", parts, node.output, name=node.name, axis=-1)]


def _sizes(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
