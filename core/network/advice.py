"""What helps with a node that TensorRT's parser refuses, where the project knows it. Says nothing where it does not."""

import re

import onnx

from suture.core.traits import MICROSOFT, OTHERS, STANDARD

SURGERY = "surgery writes it as standard operators (python -m surgery)"
STATIC_SCALES = "quantise with static scales (QuantizeLinear and DequantizeLinear, zero points 0)"
LOWER = "lower the graph with surgery and build its model.trt.onnx"
LOWERED = "surgery has lowered this graph and knows no other form of it: change the source there"
PRODUCER = "suture.surgery"  # that surgery writes into its graphs
PLUGIN = re.compile(r"no plugin of that name|failed to load|creator", re.IGNORECASE)
# of these operators in the domain com.microsoft, surgery has a pass
IMPORT_CONTRIB = tuple(op for domain, op in OTHERS if domain == MICROSOFT)
OPERATORS = {
    "AffineGrid": "write the grid as a MatMul of theta with constant coordinates",
    "BeamSearch": "take the decoder out of it: TensorRT runs one step, the search stays outside",
    "BitShift": "write it as Mul or Div by a power of two",
    "BitwiseAnd": "x & (2^k - 1) is Mod(x, 2^k)",
    "BitwiseOr": "a | b without common bits is Add(a, b)",
    "BitwiseXor": "surgery writes it as exact integer arithmetic where both operands are known to lie in [0, 2^19): bound them, as with Clip",
    "DeformConv": "write it as GridSample and MatMul",
    "DynamicQuantizeLinear": STATIC_SCALES,
    "GreedySearch": "take the decoder out of it: TensorRT runs one step, the search stays outside",
    "MatMulInteger": STATIC_SCALES,
    "QLinearConv": "write it with QuantizeLinear and DequantizeLinear around Conv",
    "QLinearMatMul": "write it with QuantizeLinear and DequantizeLinear around MatMul",
    "RoiAlign": "write it as GridSample over the boxes' points, or give a plugin library (--plugin)",
    "NonZero": "give a plugin library (--plugin), or work with the mask itself (Where)",
}
MESSAGES = (
    (r"softcap", "surgery writes the cap as Tanh around the scores"),
    (r"mask cannot be used", "add the causal mask to the mask"),
    (r"Antialias", "fold it, where its input is a constant; otherwise resize without antialias"),
    (r"zero.?point", STATIC_SCALES),
    (r"convertDtype", "cast to float32, float16, bfloat16, int64, int32 or bool: TensorRT has no such type"),
    (
        r"Failed to import initializer",
        "store it as float32, float16, bfloat16, int64, int32, int8 or bool: TensorRT has no other",
    ),
    (r"convertOnnxDims", "merge some of the dimensions: TensorRT takes eight at most"),
    (r"resolve to an initializer|is_weights|resolvedWeights|must be an initializer", "make that input an initializer"),
    (r"duplicate|already", "give each node and tensor a name of its own"),
)


def advice(node: onnx.NodeProto | None, operator: str, message: str) -> str | None:
    """One line, or None. `node` is the graph's own, where the parser's name for it is known."""
    lowered = node is not None and any(attribute.name.startswith("TRT_") for attribute in node.attribute)
    if lowered or operator.startswith("TRT_"):
        return None  # surgery wrote it: it has no pass for itself
    for pattern, remedy in MESSAGES:
        if re.search(pattern, message):
            return remedy
    if operator in IMPORT_CONTRIB and node is not None and node.domain == MICROSOFT:
        return SURGERY
    if operator in OPERATORS:
        return OPERATORS[operator]
    if PLUGIN.search(message) and node is not None and node.domain not in STANDARD:
        return "write it in standard operators, or give a plugin library (--plugin)"
    return None


def lowering_advice(model: onnx.ModelProto) -> str:
    """To lower the graph, unless it is what surgery's lowering made."""
    ops = {node.op_type for node in model.graph.node}
    lowered = model.producer_name == PRODUCER and ("Attention" not in ops or any(op.startswith("TRT_") for op in ops))
    return LOWERED if lowered else LOWER


def origin(node: onnx.NodeProto | None) -> str | None:
    """Where a node comes from in the source that was exported: the module's path, or the line of Python."""
    if node is None:
        return None
    metadata = {entry.key: entry.value for entry in node.metadata_props}
    trace = metadata.get("pkg.torch.onnx.stack_trace", node.doc_string)
    lines = re.findall(r'(?:File "?([^",]+)"?, line (\d+)|(\S+\.py)[(:](\d+))', trace)
    scopes = re.findall(r"'([^']*)'", metadata.get("pkg.torch.onnx.name_scopes", ""))
    modules = [scope for scope in scopes if scope and scope != node.name]
    parts = [modules[-1]] if modules else []
    if not parts and node.name.count("/") > 1:
        parts = [node.name.strip("/").rpartition("/")[0]]
    if lines:
        file, line, other, number = lines[-1]
        parts.append(f"{file or other}:{line or number}")
    return ", ".join(parts) or None
