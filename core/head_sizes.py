"""The size of a cached head, where an exporter left it open although its graph fixes it.

onnxruntime-genai names that dimension of its caches kv_cache_dim. Nobody can feed an empty cache without knowing it.
"""

import onnx

PASTS = {"GroupQueryAttention": (3, 4), "MultiHeadAttention": (6, 7)}  # inputs; outputs 1 and 2 are what they become


def write_head_sizes(model: onnx.ModelProto) -> None:
    """Writes the size of a head into cache inputs and outputs [B, kv_heads, slots, size] that have a symbol there, as far
    as the shapes that the graph declares for other tensors tell it."""
    values = {value.name: value for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        if node.op_type == "Concat" and len(node.input) == 2:
            _write(values, [node.input[0], node.output[0]], _dim(values, node.input[1], 3, of=4))
        elif node.op_type in PASTS and node.input:
            caches = [node.input[index] for index in PASTS[node.op_type] if index < len(node.input)] + list(node.output[1:3])
            heads = next((each.i for each in node.attribute if each.name == "num_heads"), 0)
            hidden = _dim(values, node.output[0], 2, of=3)
            _write(values, caches, hidden // heads if heads else 0)


def _write(values: dict[str, onnx.ValueInfoProto], names: list[str], size: int) -> None:
    for name in names:
        dims = values[name].type.tensor_type.shape.dim if name in values else []
        if size and len(dims) == 4 and not dims[3].dim_value:
            dims[3].dim_value = size


def _dim(values: dict[str, onnx.ValueInfoProto], name: str, axis: int, of: int) -> int:
    dims = values[name].type.tensor_type.shape.dim if name in values else []
    return dims[axis].dim_value if len(dims) == of else 0
