"""Products of the same rows with several weights become one product with those weights merged, where that was asked for.

    Gemm(x, W1, b1), Gemm(x, W2, b2), ...   →   split(Gemm(x, [W1; W2; ...], [b1; b2; ...]))

Query, key and value of one attention ("qkv"), and the two products that a gated MLP multiplies ("gate-up"). Weights that
follow one another in their file are merged by reference. Others are written anew, a slab at a time, since TensorRT merges
what is apart itself, and then holds the weights twice while it builds.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, consumers, need, onnx_type, op_of, operands, producer, rank, static_dim
from suture.surgery.graph.weights import SLAB, add_weight, follow, neighbours, place, read_bytes

SAME_ROWS = ("Reshape", "Transpose", "Cast", "Unsqueeze", "Squeeze", "Expand", "Split", "Slice", "Gather", "Identity",
             "RMSNormalization", "LayerNormalization", "RotaryEmbedding")  # fmt: skip
GATES = ("Swish", "Gelu")


def run(graph: Graph, kinds: tuple[str, ...], anew: bool = True) -> int:
    """`anew`: weights that do not follow one another are written, too."""
    matches = 0
    if "qkv" in kinds:
        matches += graph.match(partial(_merge_qkv, anew=anew), graph.nodes("Attention"))
    if "gate-up" in kinds:
        matches += graph.match(partial(_merge_gate_up, anew=anew), graph.nodes(*GATES))
    return matches


def _merge_qkv(graph: Graph, attention: gs.Node, anew: bool) -> bool:
    return _merge(graph, [_product(tensor) for tensor in attention.inputs[:3]], "qkv", anew)


def _merge_gate_up(graph: Graph, gate: gs.Node, anew: bool) -> bool:
    for gated in consumers(gate.outputs[0], "Mul"):
        up = next(right for left, right in operands(gated) if left is gate.outputs[0])
        return _merge(graph, [_product(gate.inputs[0]), _product(up)], "gate_up", anew)
    return False


def _product(tensor: gs.Tensor) -> gs.Node | None:
    """The one product with a weight that all of `tensor` comes from, past what moves, scales or shifts its numbers."""
    found: dict[int, gs.Node] = {}
    stack = [tensor]
    while stack:
        node = producer(stack.pop())
        if node is None:
            continue
        op = op_of(node)
        if op in ("Gemm", "MatMul"):
            need(producer(node.inputs[1], "DequantizeLinear") is None, f"the weight of {node.name} is quantised")
            found[id(node)] = node
        elif op in SAME_ROWS:
            stack.append(node.inputs[0])
        elif op == "TensorScatter":
            stack.append(node.inputs[1])
        elif op in ("Mul", "Add", "Concat"):
            stack += node.inputs
    return next(iter(found.values())) if len(found) == 1 else None


def _merge(graph: Graph, products: list[gs.Node | None], name: str, anew: bool) -> bool:
    """Merges those of the products that multiply the same rows, if there are several."""
    together: dict[int, dict[int, gs.Node]] = {}
    for node in products:
        if node is not None:
            together.setdefault(id(node.inputs[0]), {})[id(node)] = node
    group = list(max(together.values(), key=len, default={}).values())
    if len(group) < 2:
        return False
    for node in group:
        need(node.op == "Gemm" and isinstance(node.inputs[1], gs.Constant), f"the weight of {node.name} is computed")
        need(set(node.attrs) <= {"transB"}, f"{node.name} is scaled or transposed")
        need(len(node.inputs) < 3 or rank(node.inputs[2]) == 1, f"the bias of {node.name} is not one number an output")
    need(len({node.attrs.get("transB", 0) for node in group}) == 1, "some of its weights are transposed, some not")
    need(len({onnx_type(node.inputs[1]) for node in group}) == 1, "its weights differ in type")

    group.sort(key=lambda node: place(node.inputs[1]) or ("", 0, 0))  # neighbours in a file become neighbours here
    outputs_axis = 0 if group[0].attrs.get("transB") else 1
    sizes = [static_dim(node.inputs[1], outputs_axis) for node in group]
    module = _module(group, name)
    weights = [node.inputs[1] for node in group]
    need(anew or (outputs_axis == 0 and follow(weights)), "its weights do not follow one another in a file")
    inputs = [group[0].inputs[0], _stacked(graph, weights, outputs_axis, f"{module}.weight")]
    if any(len(node.inputs) > 2 for node in group):
        inputs.append(_stacked(graph, [_bias(graph, node, size) for node, size in zip(group, sizes)], 0, f"{module}.bias"))
    results = [node.outputs[0] for node in group]
    merged = graph.new("Gemm", inputs, dict(group[0].attrs), f"{module}/gemm", shape=["tokens", sum(sizes)])
    for result in results:
        result.inputs.clear()
    split = gs.Node("Split", graph.unique(f"{module}/split"), {"axis": -1}, [merged, graph.int64(sizes)], results)
    graph.gs.nodes.append(split)
    return True


def _module(group: list[gs.Node], name: str) -> str:
    """model.layers.0.self_attn.qkv, of the products ...self_attn.q_proj, ...self_attn.k_proj and so on."""
    paths = [node.name.replace("/", ".").split(".") for node in group]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths))
    return ".".join([part for part, *_ in shared if part] + [name])


def _bias(graph: Graph, node: gs.Node, size: int) -> gs.Constant:
    if len(node.inputs) > 2:
        return node.inputs[2]
    like = graph.number(0, onnx_type(node.inputs[1]))
    return add_weight(graph, "no_bias", onnx_type(like), [size], iter([np.zeros(size, graph.constant(like).dtype)]))


def _stacked(graph: Graph, parts: list[gs.Constant], axis: int, name: str) -> gs.Constant:
    """The parts joined along an axis, as a constant of its own."""
    shapes = [[int(size) for size in part.shape] for part in parts]
    shape = list(shapes[0])
    shape[axis] = sum(each[axis] for each in shapes)
    if axis == 0 and (one := neighbours(graph, name, parts, shape)):
        return one
    rows: Callable[[gs.Constant, int], np.ndarray] = lambda part, count: read_bytes(graph, part).reshape(count, -1)  # noqa: E731

    def slabs() -> Iterator[np.ndarray]:
        """Bytes, mapped anew for each slab, so that no more of a file than this counts as memory of this process."""
        if axis == 0:
            for part, (count, *_) in zip(parts, shapes):
                step = max(SLAB // max(prod(part.shape) // count, 1), 1)
                for start in range(0, count, step):
                    yield rows(part, count)[start : start + step]
        else:
            step = max(SLAB // shape[1], 1)
            for start in range(0, shape[0], step):
                yield np.concatenate([rows(part, shape[0])[start : start + step] for part in parts], axis=1)

    return add_weight(graph, name, onnx_type(parts[0]), shape, slabs())
