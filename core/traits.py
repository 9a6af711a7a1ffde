"""What each operator takes, as onnx.defs has it, and which of that the passes which rewrite it account for.

A pass takes a node for what its name says only where the node has nothing beyond: no input, attribute or further output
that is not accounted for here. So an attribute of a newer opset, or of somebody's own, leaves its node as it is. What only
some passes account for is listed too, and the others name what they take themselves (suture.surgery.graph.need_known).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import onnx

OPSET = 24
MICROSOFT = "com.microsoft"
STANDARD = (None, "", "ai.onnx")
REQUIRED = object()  # in place of a default


@dataclass(frozen=True)
class Traits:
    """Names of inputs and outputs by position (`variadic`: the last input any number of times), and the attributes'
    defaults: None where leaving it out is not a value, REQUIRED where it must be there."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ("output",)
    attributes: Mapping[str, object] = field(default_factory=dict)
    variadic: bool = False
    more_outputs: bool = False  # the last output any number of times


NORM = ("X", "Scale", "B", "scale", "axis", "epsilon", "stash_type")
ATTENTION = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen", "present_key", "present_value",
             "scale", "is_causal", "softcap", "q_num_heads", "kv_num_heads", "softmax_precision",
             "qk_matmul_output_mode")  # fmt: skip
QUANTISATION = ("x", "x_scale", "x_zero_point", "y_scale", "y_zero_point", "axis", "block_size")
UNARY = (
    "Abs",
    "BitwiseNot",
    "Cos",
    "Erf",
    "Floor",
    "Identity",
    "IsNaN",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Sigmoid",
    "Sin",
    "Sqrt",
    "Tanh",
)
BINARY = ("Add", "And", "BitwiseAnd", "Div", "Equal", "Expand", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "MatMul", "Mul", "Or",
          "Pow", "Sub")  # fmt: skip

ACCOUNTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(UNARY, ("X", "input")),
    **dict.fromkeys(BINARY, ("A", "B", "X", "Y", "input", "shape")),
    "AffineGrid": ("theta", "size", "align_corners"),
    "Attention": ATTENTION,
    "Cast": ("input", "to"),
    "Clip": ("input", "min", "max"),
    "Concat": ("inputs", "axis"),
    "Constant": ("value", "value_float", "value_floats", "value_int", "value_ints"),
    "ConstantOfShape": ("input", "value"),
    "Conv": ("X", "W", "B", "auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"),  # its place alone changes
    "ConvTranspose": (
        "X",
        "W",
        "B",
        "auto_pad",
        "dilations",
        "group",
        "kernel_shape",
        "output_padding",
        "output_shape",
        "pads",
        "strides",
    ),
    "CumSum": ("x", "axis", "exclusive", "reverse"),  # of which only the shape is followed
    "DeformConv": ("X", "W", "offset", "B", "mask", "dilations", "group", "kernel_shape", "offset_group", "pads", "strides"),
    "DequantizeLinear": (*QUANTISATION, "output_dtype"),
    "Dropout": ("data", "ratio", "training_mode", "seed"),
    "Gather": ("data", "indices", "axis"),
    "GatherElements": ("data", "indices", "axis"),
    "GatherND": ("data", "indices", "batch_dims"),  # of which only the shape is followed
    "Gelu": ("X", "approximate"),
    "Gemm": ("A", "B", "C", "alpha", "beta", "transA", "transB"),
    "GridSample": ("X", "grid", "align_corners", "mode", "padding_mode"),
    "GroupNormalization": ("X", "scale", "bias", "epsilon", "num_groups", "stash_type"),
    "If": ("cond", "outputs", "then_branch", "else_branch"),
    "InstanceNormalization": ("input", "scale", "B", "epsilon"),
    "LayerNormalization": NORM,
    "Loop": ("M", "cond", "v_initial", "v_final_and_scan_outputs", "body"),
    "Max": ("data_0",),
    "Min": ("data_0",),
    "Mod": ("A", "B", "fmod"),
    "QuantizeLinear": (*QUANTISATION, "saturate", "output_dtype", "precision"),
    "RMSNormalization": NORM,
    "Range": ("start", "limit", "delta"),
    "ReduceMax": ("data", "axes", "keepdims"),
    "ReduceMean": ("data", "axes", "keepdims"),
    "ReduceSum": ("data", "axes", "keepdims"),
    "Reshape": ("data", "shape", "allowzero"),
    "RotaryEmbedding": ("X", "cos_cache", "sin_cache", "position_ids", "interleaved", "num_heads", "rotary_embedding_dim"),
    "ScatterElements": ("data", "indices", "updates", "axis", "reduction"),  # what it writes is found by running it
    "ScatterND": ("data", "indices", "updates", "reduction"),
    "Shape": ("data", "start", "end"),
    "Slice": ("data", "starts", "ends", "axes", "steps"),
    "Softmax": ("input", "axis"),
    "Split": ("input", "split", "axis", "num_outputs", "outputs"),
    "Squeeze": ("data", "axes"),
    "Swish": ("X", "alpha"),
    "TensorScatter": ("past_cache", "update", "write_indices", "axis", "mode"),
    "TopK": ("X", "K", "axis", "largest", "sorted", "Indices"),
    "Tile": ("input", "repeats"),  # of which only the shape is followed
    "Transpose": ("data", "perm"),
    "Unsqueeze": ("data", "axes"),
    "Where": ("condition", "X", "Y"),
}

SKIP_NORM = ("output", "mean", "inv_std_var", "input_skip_bias_sum")
QK_NORM = {f"{x}norm_epsilon": None for x in ("qk_", "q_", "k_")}
# By domain and name, what onnx.defs does not have. Passes account for all of it, but for attributes with a default here.
OTHERS: dict[tuple[str, str], Traits] = {
    ("", "SimplifiedLayerNormalization"): Traits(
        ("X", "scale"), ("Y", "inv_std_var"), {"axis": None, "epsilon": None, "stash_type": 1}
    ),
    (MICROSOFT, "SimplifiedLayerNormalization"): Traits(
        ("X", "scale"), ("Y", "inv_std_var"), {"axis": None, "epsilon": None, "stash_type": 1}
    ),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): Traits(
        ("input", "skip", "gamma", "bias"), SKIP_NORM, {"epsilon": None}
    ),
    (MICROSOFT, "SkipLayerNormalization"): Traits(
        ("input", "skip", "gamma", "beta", "bias"), SKIP_NORM, {"epsilon": None}
    ),
    (MICROSOFT, "Gelu"): Traits(("X",)),
    (MICROSOFT, "BiasGelu"): Traits(("A", "B")),
    (MICROSOFT, "FastGelu"): Traits(("X", "bias")),
    (MICROSOFT, "QuickGelu"): Traits(("X",), attributes={"alpha": None}),
    (MICROSOFT, "FusedMatMul"): Traits(
        ("A", "B"), attributes=dict.fromkeys(("alpha", "transA", "transB", "transBatchA", "transBatchB"))
    ),
    (MICROSOFT, "MatMulNBits"): Traits(
        ("A", "B", "scales", "zero_points", "g_idx", "bias"),
        attributes=dict.fromkeys(("K", "N", "bits", "block_size", "accuracy_level", "weight_prepacked")),
    ),
    (MICROSOFT, "GatherBlockQuantized"): Traits(
        ("data", "indices", "scales", "zero_points"),
        attributes=dict.fromkeys(("bits", "block_size", "gather_axis", "quantize_axis")),
    ),
    (MICROSOFT, "RotaryEmbedding"): Traits(
        ("input", "position_ids", "cos_cache", "sin_cache"),
        attributes=dict.fromkeys(("interleaved", "is_packed_batching", "num_heads", "rotary_embedding_dim", "scale")),
    ),
    (MICROSOFT, "GroupQueryAttention"): Traits(
        ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
         "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight",
         "query_seqlens"),
        ("output", "present_key", "present_value", "output_qk"),
        dict.fromkeys(
            ("causal", "do_rotary", "k_quant_type", "kv_num_heads", "local_window_size", "num_heads", "rotary_interleaved",
             "scale", "sliding_window_cache", "smooth_softmax", "softcap", "v_quant_type")
        ) | QK_NORM | {"qk_output": 0, "kv_cache_bit_width": 0},
    ),
    (MICROSOFT, "Attention"): Traits(
        ("input", "weights", "bias", "mask_index", "past", "attention_bias", "past_sequence_length"),
        ("output", "present"),
        dict.fromkeys(
            ("num_heads", "unidirectional", "qkv_hidden_sizes", "scale", "mask_filter_value", "do_rotary",
             "past_present_share_buffer", "rotary_embedding_dim")
        ),
    ),
    (MICROSOFT, "EmbedLayerNormalization"): Traits(
        ("input_ids", "segment_ids", "word_embedding", "position_embedding", "segment_embedding", "gamma", "beta", "mask",
         "position_ids"),
        ("output", "mask_index", "embedding_sum"),
        {"epsilon": None, "mask_index_type": 0},
    ),
    (MICROSOFT, "MultiHeadAttention"): Traits(
        ("query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key", "past_value",
         "past_sequence_length", "cache_indirection"),
        ("output", "present_key", "present_value", "qk"),
        dict.fromkeys(("num_heads", "scale", "unidirectional", "mask_filter_value")),  # what hides is only ever compared
    ),
    ("", "TRT_Attention"): Traits(
        ("query", "key", "value", "mask", "query_lengths", "kv_lengths"),
        attributes=dict.fromkeys(("causal_kind", "TRT_decomposable")),
    ),
}  # fmt: skip


@cache
def traits(op: str, domain: str = "") -> Traits | None:
    """What the operator takes; None for one that is not known."""
    if (domain, op) in OTHERS:
        return OTHERS[domain, op]
    try:
        schema = onnx.defs.get_schema(op, OPSET, domain)
    except onnx.defs.SchemaError:
        return None
    many = onnx.defs.OpSchema.FormalParameterOption.Variadic
    variadic, more_outputs = (bool(side) and side[-1].option == many for side in (schema.inputs, schema.outputs))
    attributes = {name: _default(attribute) for name, attribute in schema.attributes.items()}
    inputs, outputs = (tuple(each.name for each in side) for side in (schema.inputs, schema.outputs))
    return Traits(inputs, outputs, attributes, variadic, more_outputs)


def input_index(op: str, name: str, domain: str = "") -> int:
    """The place of an operator's input, by its name. Raises ValueError where it has none of that name."""
    known = traits(op, domain)
    if known is None or name not in known.inputs:
        raise ValueError(f"{op} has no input {name}")
    return known.inputs.index(name)


def output_index(op: str, name: str, domain: str = "") -> int:
    """The same of an operator's output."""
    known = traits(op, domain)
    if known is None or name not in known.outputs:
        raise ValueError(f"{op} has no output {name}")
    return known.outputs.index(name)


def named_input(node: onnx.NodeProto, name: str) -> str:
    """The tensor that a node takes as the input of this name; "" where it takes none."""
    domain = "" if node.domain in STANDARD else node.domain
    index = input_index(node.op_type, name, domain)
    return node.input[index] if index < len(node.input) else ""


def unaccounted(
    op: str,
    domain: str | None,
    inputs: Sequence[bool],
    attributes: Mapping[str, object],
    outputs: Sequence[bool],
    known: Sequence[str] | None = None,
) -> str | None:
    """What a node has that is not accounted for, in words; None where there is no such thing.

    `inputs` and `outputs`: by position, whether it is there, or used. `known`: names of inputs, attributes and outputs that
    whoever asks accounts for; what the table has where there is none. The first output needs no name.
    """
    domain = "" if domain in STANDARD else domain
    trait = traits(op, domain)
    if trait is None:
        return None  # whoever looks for an operator that nobody else knows, knows it
    if known is None:
        ours = (domain, op) in OTHERS
        free = [name for name, default in trait.attributes.items() if not ours or default is None]
        known = ACCOUNTED[op] if not domain and op in ACCOUNTED else (*trait.inputs, *trait.outputs, *free)
    for index, there in enumerate(inputs):
        name = _name(trait.inputs, index, trait.variadic)
        if there and name not in known:
            return f"its input {name or index}"
    for name, value in attributes.items():
        if name not in trait.attributes:
            return f"the unknown attribute {name}"
        default = trait.attributes[name]
        if name not in known and default is not REQUIRED and not _same(value, default):
            return f"its attribute {name}={value}"
    for index, used in enumerate(outputs):
        name = _name(trait.outputs, index, trait.more_outputs)
        if used and index and name not in known:
            return f"its output {name or index}"
    return None


def _name(names: tuple[str, ...], index: int, variadic: bool) -> str | None:
    if index < len(names):
        return names[index]
    return names[-1] if variadic else None


def _default(attribute: onnx.defs.OpSchema.Attribute) -> object:
    if attribute.required:
        return REQUIRED
    value = attribute.default_value
    return None if value.type == onnx.AttributeProto.UNDEFINED else _plain(onnx.helper.get_attribute_value(value))


def _plain(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


def _same(value: object, default: object) -> bool:
    return default is not None and _plain(value) == default
