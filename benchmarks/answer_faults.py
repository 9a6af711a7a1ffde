"""Faults that a damaged engine of a vision-language model would have, planted in one part's portable graph.

Each is one thing read wrongly wherever the graph has it, as a parser, a pass or a builder would: an attribute dropped, an operand in
another's place, an axis or a slot off. What is chosen is what has gone wrong in such engines, not what shows.
"""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from suture.core.pictures import DECODER, VISION

Fault = Callable[[onnx.GraphProto], None]


def of_type(graph: onnx.GraphProto, op_type: str) -> list[onnx.NodeProto]:
    """Raises ValueError where there is none: a fault that changes nothing is none."""
    found = [node for node in graph.node if node.op_type == op_type]
    if not found:
        raise ValueError(f"the graph has no {op_type} to damage")
    return found


def with_attribute(op_type: str, **values: object) -> Fault:
    """All nodes of a type get other attributes; None drops one."""

    def fault(graph: onnx.GraphProto) -> None:
        for node in of_type(graph, op_type):
            kept = [each for each in node.attribute if each.name not in values]
            given = [helper.make_attribute(name, value) for name, value in values.items() if value is not None]
            node.ClearField("attribute")
            node.attribute.extend([*kept, *given])

    return fault


def scaled_twice(graph: onnx.GraphProto) -> None:
    """By whoever multiplied the query already, and by Attention."""
    for node in of_type(graph, "Attention"):
        (scale,) = [each for each in node.attribute if each.name == "scale"]
        scale.f = scale.f**2


def left_out(op_type: str) -> Fault:
    def fault(graph: onnx.GraphProto) -> None:
        for node in of_type(graph, op_type):
            node.op_type = "Identity"
            node.ClearField("attribute")
            del node.input[1:]

    return fault


def keys_for_values(graph: onnx.GraphProto) -> None:
    for node in of_type(graph, "Attention"):
        node.input[1], node.input[2] = node.input[2], node.input[1]


def without_lengths(graph: onnx.GraphProto) -> None:
    """TensorRT's parser drops nonpad_kv_seqlen; is_causal alone lets token i of a step see the slots up to i."""
    for node in of_type(graph, "Attention"):
        del node.input[6:]


def one_slot_late(graph: onnx.GraphProto) -> None:
    """Keys and values are written beside the slot that is theirs."""
    for node in of_type(graph, "TensorScatter"):
        before(graph, node, 2, "Add", np.array([1], np.int64))


def tiled_heads(graph: onnx.GraphProto) -> None:
    """Key heads are repeated as 0 1 0 1 0 1 for query heads that want 0 0 0 1 1 1."""
    query_heads, key_heads = heads_of(graph)
    order = np.arange(query_heads).reshape(key_heads, -1).T.flatten()
    for node in of_type(graph, "Attention"):
        before(graph, node, 0, "Gather", np.argsort(order), axis=1)
        behind(graph, node, "Gather", order, axis=1)


def columns_first(graph: onnx.GraphProto) -> None:
    """Patches are numbered column by column."""
    (patches,) = of_type(graph, "Conv")
    behind(graph, patches, "Transpose", perm=[0, 1, 3, 2])


def one_token_early(graph: onnx.GraphProto) -> None:
    """The class token is among the features, and the last patch is not."""
    (cut,) = of_type(graph, "Slice")
    starts = constant(graph, np.array([0], np.int64))
    del cut.input[1:]
    cut.input.extend([starts, constant(graph, np.array([-1], np.int64)), constant(graph, np.array([1], np.int64))])


def not_transposed(weight: str) -> Fault:
    """One square weight of one layer is taken as the product's own."""

    def fault(graph: onnx.GraphProto) -> None:
        (product,) = [node for node in of_type(graph, "Gemm") if node.input[1].endswith(weight)]
        (transposed,) = [each for each in product.attribute if each.name == "transB"]
        transposed.i = 0

    return fault


def heads_of(graph: onnx.GraphProto) -> tuple[int, int]:
    """Of queries and of keys, as a decoder's caches and its output projection have them."""
    cache = next(each for each in graph.input if each.name.endswith(".key")).type.tensor_type.shape.dim
    weight = next(each for each in graph.initializer if each.name.endswith("o_proj.weight"))
    return weight.dims[1] // cache[3].dim_value, cache[1].dim_value


def before(graph: onnx.GraphProto, node: onnx.NodeProto, place: int, op_type: str, *values: np.ndarray, **given) -> None:
    """A node of that type between an input and what made it."""
    made = f"{node.output[0]}/{place}"
    inputs = [node.input[place], *(constant(graph, each) for each in values)]
    graph.node.insert(list(graph.node).index(node), helper.make_node(op_type, inputs, [made], **given))
    node.input[place] = made


def behind(graph: onnx.GraphProto, node: onnx.NodeProto, op_type: str, *values: np.ndarray, **given) -> None:
    """A node of that type between the output and those that read it."""
    output = node.output[0]
    node.output[0] = f"{output}/own"
    inputs = [node.output[0], *(constant(graph, each) for each in values)]
    graph.node.insert(list(graph.node).index(node) + 1, helper.make_node(op_type, inputs, [output], **given))


def constant(graph: onnx.GraphProto, value: np.ndarray) -> str:
    name = f"planted/{len(graph.initializer)}"
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


FAULTS: dict[str, tuple[str, Fault]] = {
    "attention without its scale": (VISION, with_attribute("Attention", scale=1.0)),
    "attention scaled twice": (VISION, scaled_twice),
    "keys in the place of values": (VISION, keys_for_values),
    "QuickGELU without its 1.702": (VISION, with_attribute("Swish", alpha=None)),
    "QuickGELU left out": (VISION, left_out("Swish")),
    "the projector's GELU left out": (VISION, left_out("Gelu")),
    "patches by columns": (VISION, columns_first),
    "features one token early": (VISION, one_token_early),
    "one weight not transposed": (VISION, not_transposed("layers.1.self_attn.out_proj.weight")),
    "a decoder's attention without its scale": (DECODER, with_attribute("Attention", scale=1.0)),
    "a decoder's attention scaled twice": (DECODER, scaled_twice),
    "values in the place of keys": (DECODER, keys_for_values),
    "a step that sees its later tokens": (DECODER, with_attribute("Attention", is_causal=0)),
    "the valid lengths dropped": (DECODER, without_lengths),
    "written one slot late": (DECODER, one_slot_late),
    "key heads in another order": (DECODER, tiled_heads),
    "rotary positions turn neighbours, not halves": (DECODER, with_attribute("RotaryEmbedding", interleaved=1)),
    "Swish left out": (DECODER, left_out("Swish")),
    "one weight of the decoder not transposed": (DECODER, not_transposed("layers.1.self_attn.o_proj.weight")),
}
