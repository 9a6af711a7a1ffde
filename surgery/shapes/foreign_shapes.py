"""Shapes of what com.microsoft ops compute, which onnx's inference knows nothing of and stops at.

Each such node is replaced, in a copy that is only looked at, by standard ones whose result has the same shape; one
inference over the copy then reaches everything. A graph whose exporter wrote all shapes down is left as it is.
"""

import onnx
from onnx import TensorProto, helper, shape_inference

DOMAIN = "com.microsoft"
NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization")
SAME_SHAPE = (*NORMS, "Gelu", "BiasGelu", "FastGelu", "QuickGelu", "RotaryEmbedding", "MultiHeadAttention")


def declare_shapes(model: onnx.ModelProto) -> None:
    """Adds to the graph's declared shapes what follows from its com.microsoft nodes."""
    declared = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    if all(node.output[0] in declared for node in model.graph.node if _contrib(node)):
        return
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    nodes, weights = [], {tensor.name: tensor for tensor in copy.graph.initializer}
    for node in copy.graph.node:
        nodes += _stand_in(node, weights) if _contrib(node) else [node]
    del copy.graph.node[:], copy.graph.initializer[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(weights.values())
    inferred = shape_inference.infer_shapes(copy, data_prop=True).graph.value_info
    wanted = {name for node in model.graph.node for name in node.output} - declared
    model.graph.value_info.extend(value for value in inferred if value.name in wanted)


def _contrib(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN or (node.op_type == "SimplifiedLayerNormalization" and not node.domain)


def _stand_in(node: onnx.NodeProto, weights: dict[str, TensorProto]) -> list[onnx.NodeProto]:
    attrs = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    x, result = node.input[0], node.output[0]
    if node.op_type in SAME_SHAPE:
        sums = node.output[3:4] if node.op_type in NORMS else []
        return [helper.make_node("Identity", [x], [name]) for name in (result, *sums) if name]
    if node.op_type == "Attention" and node.input[1] in weights:
        packed, name = weights[node.input[1]], f"{result}/weight"
        width = (attrs.get("qkv_hidden_sizes") or [packed.dims[1] // 3])[-1]
        weights[name] = TensorProto(name=name, data_type=packed.data_type, dims=[packed.dims[0], width])
        return [helper.make_node("MatMul", [x, name], [result])]
    if node.op_type == "EmbedLayerNormalization":
        return [helper.make_node("Gather", [node.input[2], x], [name]) for name in (result, *node.output[2:3]) if name]
    if node.op_type == "MatMulNBits" and node.input[2] in weights:
        name, dtype = f"{result}/weight", weights[node.input[2]].data_type
        weights[name] = TensorProto(name=name, data_type=dtype, dims=[attrs["K"], attrs["N"]])
        return [helper.make_node("MatMul", [x, name], [result])]
    if node.op_type == "GatherBlockQuantized" and len(node.input) > 2 and node.input[2] in weights:
        scales, name = weights[node.input[2]], f"{result}/table"
        dims = [scales.dims[0], scales.dims[-1] * attrs.get("block_size", 128)]
        weights[name] = TensorProto(name=name, data_type=scales.data_type, dims=dims)
        return [helper.make_node("Gather", [name, node.input[1]], [result], axis=0)]
    if node.op_type == "GroupQueryAttention":
        heads, kv_heads = attrs["num_heads"], attrs["kv_num_heads"]
        if len(node.input) > 1 and node.input[1]:
            return [helper.make_node("Identity", [x], [result])]
        parts = [f"{result}/{index}" for index in range(heads + 2 * kv_heads)]
        split = helper.make_node("Split", [x], parts, axis=-1, num_outputs=len(parts))
        return [split, helper.make_node("Concat", parts[:heads], [result], axis=-1)]
    return []
