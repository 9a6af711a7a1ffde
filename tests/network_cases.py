"""One ONNX operator at a time: what TensorRT's parser makes of it, next to what onnxruntime computes.

A case is a graph in ONNX's text form, once for each dtype that stands in for `T`. Expected is agreement, unless the
case says which other thing TensorRT does; a TensorRT version that changes it fails the test, and the table is corrected.
"""
# ruff: noqa: E501 (a graph is a line)

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from network_rows import FLOATS, INTS, Dies, Differs, Refused, Row, Unknown
from network_rows_attention import ATTENTION
from network_rows_vision import LOOPS, VISION


@dataclass(frozen=True)
class Case:
    name: str
    model: onnx.ModelProto
    reference: onnx.ModelProto
    feeds: dict
    expected: object


HEADER = '<ir_version: 11, opset_import: ["" : 24, "com.microsoft" : 1, "trt" : 1]>\n'
CONSTANT = re.compile(r"\bT((?:\[[\d,]*\])? \w+ = \{)")


def cases() -> Iterator[Case]:
    seen: dict[str, int] = {}
    for row in ROWS:
        for dtype in row.types.split():
            model, reference = (_parsed(text, dtype) for text in (row.graph, row.reference or row.graph))
            name = f"{'+'.join(dict.fromkeys(node.op_type for node in model.graph.node))}-{dtype}"
            seen[name] = seen.get(name, 0) + 1
            yield Case(f"{name}-{seen[name]}", model, reference, row.feeds, row.expected)


def _parsed(text: str, dtype: str) -> onnx.ModelProto:
    """The graph with `dtype` for T. The text form has no 16-bit float literals: constants are read as float32 first."""
    constants = {match.split()[-3] for match in CONSTANT.findall(text)}
    text = re.sub(r"\bT\b", dtype, CONSTANT.sub(r"float\1", text))
    model = onnx.parser.parse_model(f"{HEADER} case {text}")
    wanted = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(dtype.upper()))
    for tensor in model.graph.initializer:  # as raw bytes: TensorRT reads 8 and 4 bits in no other form
        array = onnx.numpy_helper.to_array(tensor)
        array = array.astype(wanted) if tensor.name in constants else array
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return model


BINARY = "(T[N,4] x, T[{}] y) => (T[N,4] z) {{ z = {}(x, y) }}"
COMPARED = "(T[N,4] x, T[4] y) => (bool[N,4] z) {{ z = {}(x, y) }}"
UNARY = "(T[N,4] {}) => (T[N,4] y) {{ y = {}({}) }}"
REDUCED = "(T[N,4,3] x) => (T[{}] y) <int64[1] axes = {{{}}}> {{ y = {}<keepdims = {}>(x, axes) }}"
LOGICAL = "(bool[N,4] x, bool[N,4] y) => (bool[N,4] z) {{ z = {}(x, y) }}"
BLOCKS = """(T[N,4] x) => (T[N,4] y)
    <W[4,4] w = {1, 2, 3, 4, -5, -6, -7, -8, 1, 1, 2, 2, -3, -3, 4, 4}, T[2,4] s = {0.5, 0.25, 1, 2, 3, 0.125, 1.5, 2.5}>
    { d = DequantizeLinear<axis = 0, block_size = 2>(w, s) y = MatMul(x, d) }"""


SIGNED = {"x": np.array([-7, 7, -7, 7, 6]), "y": np.array([2, -2, -2, 2, 3])}
NO_TIES = np.array([[0.123, -0.456, 9, 0.25]])  # over its scales: onnxruntime rounds a float16 quotient to float16 first


ROWS = [
    # arithmetic
    *(Row(BINARY.format("N,4", op), f"{FLOATS} {INTS}") for op in ("Add", "Sub", "Mul")),
    Row(BINARY.format("4", "Add"), FLOATS),
    Row(BINARY.format("1,1", "Mul"), FLOATS),
    Row("(T[N,4] x, T[N,4] positive) => (T[N,4] z) { z = Div(x, positive) }", FLOATS),
    Row("(T[N] x, T[N] y) => (T[N] z) { z = Div(x, y) }", INTS, feeds=SIGNED),
    Row("(T[N] x, T[N] y) => (T[N] z) { z = Mod(x, y) }", INTS, feeds=SIGNED),
    Row("(T[N,4] positive, T[4] y) => (T[N,4] z) { z = Pow(positive, y) }", FLOATS),
    Row("(T[N,4] x, T[N,4] positive) => (T[N,4] z) { z = Mod<fmod = 1>(x, positive) }", "float float16"),
    Row("(T[N,4] x, T[4] y, T[N,1] w) => (T[N,4] z) { z = Max(x, y, w) }", f"{FLOATS} int64"),
    Row("(T[N,4] x, T[4] y) => (T[N,4] z) { z = Min(x, y) }", f"{FLOATS} int64"),
    Row("(T[N,4] x, T[4] y, T[N,1] w) => (T[N,4] z) { z = Sum(x, y, w) }", "float"),
    Row("(T[N,4] x, T[4] y, T[N,1] w) => (T[N,4] z) { z = Mean(x, y, w) }", "float"),
    *(Row(COMPARED.format(op), "float float16 int64") for op in ("Equal", "Less", "Greater")),
    *(Row(COMPARED.format(op), "float int64") for op in ("LessOrEqual", "GreaterOrEqual")),
    *(Row(LOGICAL.format(op)) for op in ("And", "Or", "Xor")),
    Row("(bool[N,4] x) => (bool[N,4] y) { y = Not(x) }"),
    Row("(bool[N,4] c, T[N,4] x, T[1] y) => (T[N,4] z) { z = Where(c, x, y) }", f"{FLOATS} int64"),
    # one input
    *(Row(UNARY.format("x", op, "x"), FLOATS) for op in ("Abs", "Neg", "Exp", "Sigmoid", "Tanh", "Relu", "Erf")),
    *(Row(UNARY.format("positive", op, "positive"), FLOATS) for op in ("Log", "Sqrt", "Reciprocal")),
    *(Row(UNARY.format("x", op, "x")) for op in ("Sin", "Cos", "Tan", "Sinh", "Cosh", "Atan", "Asinh")),
    *(Row(UNARY.format("x", op, "x")) for op in ("Ceil", "Floor", "Sign", "Softplus", "Softsign", "Elu")),
    *(Row(UNARY.format("x", op, "x")) for op in ("HardSigmoid", "HardSwish", "Mish", "Celu", "LeakyRelu", "ThresholdedRelu")),
    Row(UNARY.format("x", "Selu", "x"), expected=Differs("takes alpha 1.6732 and gamma 1.0507, the defaults of opset 1")),
    Row("(T[N,4] x) => (T[N,4] y) { y = Selu<alpha = 1.6732632, gamma = 1.050701>(x) }"),
    Row("(T[4] x) => (T[4] y) { y = Round(x) }", feeds={"x": np.array([0.5, 1.5, -0.5, -2.5], np.float32)}),
    Row("(T[4] x) => (bool[4] y) { y = IsNaN(x) }", feeds={"x": np.array([0, np.nan, np.inf, 1], np.float32)}),
    Row("(T[4] x) => (bool[4] y) { y = IsInf(x) }", feeds={"x": np.array([0, np.nan, np.inf, -np.inf], np.float32)}),
    Row("(T[N,4] x) => (T[N,4] y) { y = Gelu(x) }", FLOATS),
    Row('(T[N,4] x) => (T[N,4] y) { y = Gelu<approximate = "tanh">(x) }', FLOATS),
    Row("(T[N,4] x) => (T[N,4] y) { y = Swish(x) }", FLOATS),
    Row("(T[N,4] x) => (T[N,4] y) { y = Swish<alpha = 1.702>(x) }", "float float16"),
    Row("(T[N,4] x) => (T[N,4] y) <T low = {-0.5}, T high = {0.5}> { y = Clip(x, low, high) }", "float float16 int64"),
    Row("(T[N,4] x) => (T[N,4] y) <T low = {0}> { y = Clip(x, low) }", "float"),
    Row("(T[N,4] x) => (T[N,4] y) <T[4] slope = {0.1, 0.2, 0.3, 0.4}> { y = PRelu(x, slope) }", "float float16"),
    # sums
    *(Row(REDUCED.format("N,4,1", "-1", op, 1), "float float16") for op in ("ReduceSum", "ReduceMean", "ReduceMax")),
    *(Row(REDUCED.format("N,3", "1", op, 0), "float") for op in ("ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")),
    *(Row(REDUCED.format("N,3", "1", op, 0), "float") for op in ("ReduceSumSquare", "ReduceLogSumExp")),
    Row(REDUCED.format("N,4,1", "-1", "ReduceSum", 1), "int64"),
    Row("(T[N,4] x) => (T[] y) { y = ReduceMean<keepdims = 0>(x) }", "float float16"),
    Row("(T[N,8] x, T[8,4] y) => (T[N,4] z) { z = MatMul(x, y) }", FLOATS),
    Row("(T[B,2,S,8] x, T[B,2,8,L] y) => (T[B,2,S,L] z) { z = MatMul(x, y) }", FLOATS),
    Row("(T[B,S,8] x, T[8,4] y) => (T[B,S,4] z) { z = MatMul(x, y) }", "float float16"),
    Row("(T[8] x, T[8,4] y) => (T[4] z) { z = MatMul(x, y) }", "float"),
    Row("(T[N,8] x, T[8] y) => (T[N] z) { z = MatMul(x, y) }", "float"),
    Row("(T[N,8] x, T[4,8] w, T[4] b) => (T[N,4] z) { z = Gemm<transB = 1>(x, w, b) }", FLOATS),
    Row("(T[8,N] x, T[8,4] w) => (T[N,4] z) { z = Gemm<transA = 1, alpha = 0.5>(x, w) }", "float float16"),
    Row("(T[N,8] x, T[8,4] w, T[4] b) => (T[N,4] z) { z = Gemm<alpha = 0.5, beta = 2.0>(x, w, b) }", "float float16"),
    Row('(T[B,S,8] x, T[B,L,8] y) => (T[B,S,L] z) { z = Einsum<equation = "bsd,bld->bsl">(x, y) }', "float float16"),
    Row(
        "(T[N,3,8] x, T[5,3,3] w, T[5] b) => (T[N,5,4] y)"
        "{ y = Conv<kernel_shape = [3], strides = [2], pads = [1, 1]>(x, w, b) }",
        "float float16",
    ),
    Row("(T[N,4] x) => (T[N,4] y) { y = Softmax(x) }", FLOATS),
    Row("(T[N,4,3] x) => (T[N,4,3] y) { y = Softmax<axis = 1>(x) }", "float float16"),
    Row("(T[N,4] x) => (T[N,4] y) { y = LogSoftmax(x) }", "float"),
    Row("(T[N,4] x) => (T[N,4] y) <int64 axis = {1}> { y = CumSum(x, axis) }", "float float16 int64"),
    Row("(T[N,4] x) => (T[N,4] y) <int64 axis = {1}> { y = CumSum<exclusive = 1, reverse = 1>(x, axis) }", "float int64"),
    Row("(T[N,8] x) => (T[N,3] y, int64[N,3] i) <int64[1] k = {3}> { y, i = TopK(x, k) }", "float float16"),
    Row("(T[N,8] x) => (T[N,3] y, int64[N,3] i) <int64[1] k = {3}> { y, i = TopK<largest = 0>(x, k) }", "float"),
    Row("(T[N,8] x) => (int64[N] y) { y = ArgMax<axis = 1, keepdims = 0>(x) }", "float float16"),
    Row("(T[N,8] x) => (int64[N,1] y) { y = ArgMin<axis = 1>(x) }", "float"),
    # norms
    Row("(T[N,8] x, T[8] w, T[8] b) => (T[N,8] y) { y = LayerNormalization<epsilon = 0.01>(x, w, b) }", FLOATS),
    Row("(T[N,S,8] x, T[8] w) => (T[N,S,8] y) { y = LayerNormalization(x, w) }", FLOATS),
    Row("(T[N,S,8] x, T[8] w) => (T[N,S,8] y) { y = RMSNormalization<epsilon = 0.01>(x, w) }", FLOATS),
    Row(
        "(float16[N,8] x, float[8] w) => (float[N,8] y) { y = RMSNormalization(x, w) }",
        reference="(float16[N,8] x, float[8] w) => (float[N,8] y) { xf = Cast<to = 1>(x) y = RMSNormalization(xf, w) }",
    ),
    Row("(T[N,4,6] x, T[4] w, T[4] b) => (T[N,4,6] y) { y = GroupNormalization<num_groups = 2>(x, w, b) }", "float float16"),
    Row("(T[N,4,6] x, T[4] w, T[4] b) => (T[N,4,6] y) { y = InstanceNormalization(x, w, b) }", "float float16"),
    # shapes and places
    Row("(T[N,4,3] x) => (int64[3] y) { y = Shape(x) }", "float"),
    Row("(T[N,4,3] x) => (int64[1] y) { y = Shape<start = -1>(x) }", "float"),
    Row("(T[N,4] x) => (int64[] y) { y = Size(x) }", "float"),
    Row("(T[N,4,3] x) => (T[N,12] y) <int64[2] s = {0, -1}> { y = Reshape(x, s) }", FLOATS),
    Row(
        "(T[N,4,3] x) => (T[N,2,6] y) { n = Shape<end = 1>(x) r = Constant<value_ints = [2, 6]>() s = Concat<axis = 0>(n, r) y = Reshape(x, s) }"
    ),
    Row("(T[N,4,3] x) => (T[3,N,4] y) { y = Transpose<perm = [2, 0, 1]>(x) }", "float int64 bool"),
    Row("(T[N,1,4,1] x) => (T[N,4] y) <int64[2] a = {1, -1}> { y = Squeeze(x, a) }"),
    Row("(T[1,1] x) => (T[] y) { y = Squeeze(x) }"),
    Row("(T[N,4] x) => (T[N,1,4,1] y) <int64[2] a = {1, -1}> { y = Unsqueeze(x, a) }"),
    Row("(T[N,4,3] x) => (T[N,12] y) { y = Flatten(x) }"),
    Row("(T[N,4] x, T[N,2] z) => (T[N,6] y) { y = Concat<axis = -1>(x, z) }", "float float16 int64 bool"),
    Row("(T[N,6] x) => (T[N,2] y, T[N,4] z) <int64[2] s = {2, 4}> { y, z = Split<axis = 1>(x, s) }", "float float16"),
    Row(
        "(T[N,6] x) => (T[N,3] y) <int64[1] b = {0}, int64[1] e = {-1}, int64[1] a = {1}, int64[1] s = {2}> { y = Slice(x, b, e, a, s) }",
        "float int64",
    ),
    Row(
        "(T[N,6] x) => (T[N,6] y) <int64[1] b = {-1}, int64[1] e = {-99}, int64[1] a = {1}, int64[1] s = {-1}> { y = Slice(x, b, e, a, s) }"
    ),
    Row(
        "(T[N,6] x, int64[1] e) => (T[N,M] y) <int64[1] b = {0}, int64[1] a = {1}> { y = Slice(x, b, e, a) }",
        feeds={"e": np.array([4])},
    ),
    Row("(T[N,1,4] x) => (T[N,3,4] y) <int64[3] s = {1, 3, 1}> { y = Expand(x, s) }", "float float16 bool"),
    Row("(T[N,4] x) => (T[N,8] y) <int64[2] r = {1, 2}> { y = Tile(x, r) }"),
    Row("(T[N,4] x) => (T[N,7] y) <int64[4] p = {0, 1, 0, 2}, T v = {5}> { y = Pad(x, p, v) }", "float float16"),
    Row('(T[N,4] x) => (T[N,7] y) <int64[4] p = {0, 1, 0, 2}> { y = Pad<mode = "reflect">(x, p) }'),
    Row('(T[N,4] x) => (T[N,7] y) <int64[4] p = {0, 1, 0, 2}> { y = Pad<mode = "edge">(x, p) }'),
    Row("(T[9,4] x, int64[B,S] index) => (T[B,S,4] y) { y = Gather(x, index) }", FLOATS),
    Row("(T[9,4] x, int32[S] index) => (T[9,S] y) { y = Gather<axis = 1>(x, index) }"),
    Row("(T[N,4] x) => (T[N] y) <int64 i = {-1}> { y = Gather<axis = 1>(x, i) }"),
    Row("(T[5,4] x, int64[5,2] index) => (T[5,2] y) { y = GatherElements<axis = 1>(x, index) }"),
    Row("(T[4,5,3] x, int64[N,2] index) => (T[N,3] y) { y = GatherND(x, index) }"),
    Row("(T[2,4,3] x, int64[2,1] index) => (T[2,3] y) { y = GatherND<batch_dims = 1>(x, index) }"),
    Row("(T[4,3] x, int64[2,1] i, T[2,3] u) => (T[4,3] y) { y = ScatterND(x, i, u) }", feeds={"i": np.array([[3], [0]])}),
    Row(
        "(T[4,3] x, int64[2,3] i, T[2,3] u) => (T[4,3] y) { y = ScatterElements<axis = 0>(x, i, u) }",
        feeds={"i": np.array([[3, 0, 1], [0, 1, 2]])},
    ),
    Row(
        '(T[4,3] x, int64[2,1] i, T[2,3] u) => (T[4,3] y) { y = ScatterND<reduction = "add">(x, i, u) }',
        expected=Refused("reduction is not supported"),
        feeds={"i": np.array([[3], [0]])},
    ),
    Row("(T[N,4,4] x) => (T[N,4,4] y) { y = Trilu<upper = 0>(x) }", "float float16 int64 bool"),
    Row("(T[N,4,4] x) => (T[N,4,4] y) { y = Trilu(x) }", expected=Differs("takes 0 for the default of upper, which is 1")),
    Row("(T[N,4,4] x) => (T[N,4,4] y) <int64 k = {1}> { y = Trilu<upper = 1>(x, k) }"),
    Row("(T[N,4] x) => (int64[2,M] y) { y = NonZero(x) }", expected=Refused("no operator NonZero")),
    Row("(int64[N] index) => (float[N,5] y) <int64 d = {5}, float[2] v = {0, 1}> { y = OneHot(index, d, v) }"),
    Row("(int64[] n) => (int64[M] y) <int64 a = {0}, int64 d = {1}> { y = Range(a, n, d) }", feeds={"n": np.array(5)}),
    Row(
        "(int64[] n) => (float[M] y) <float a = {0}, float d = {0.5}> { f = Cast<to = 1>(n) y = Range(a, f, d) }",
        feeds={"n": np.array(3)},
    ),
    Row("(T[N,4] x) => (float[N,4] y) { s = Shape(x) y = ConstantOfShape<value = float[1] {3.0}>(s) }"),
    # casts
    *(
        Row(f"(T[N,4] x) => ({to}[N,4] y) {{ y = Cast<to = {code}>(x) }}", "float float16 int32 int64 bool")
        for to, code in (("float", 1), ("float16", 10), ("int32", 6), ("int64", 7), ("bool", 9))
    ),
    Row("(bfloat16[N,4] x) => (float[N,4] y) { y = Cast<to = 1>(x) }"),
    Row("(float[N,4] x) => (bfloat16[N,4] y) { y = Cast<to = 16>(x) }"),
    Row("(T[N,4] x) => (T[N,4] y) { y = Identity(x) }", "float int64"),
    # control
    Row(
        "(bool[] c, T[N,4] x) => (T[N,4] y) { y = If(c) <then_branch = a () => (T[N,4] p) { p = Relu(x) }, else_branch = b () => (T[N,4] q) { q = Neg(x) }> }",
        "float float16",
        feeds={"c": np.array(True)},
    ),
    Row(
        "(bool[] c, T[N,4] x) => (T[N,4] y) { y = If(c) <then_branch = a () => (T[N,4] p) { p = Relu(x) }, else_branch = b () => (T[N,4] q) { q = Neg(x) }> }",
        "float",
        feeds={"c": np.array(False)},
    ),
    Row(
        "(int64[] n, T[N,4] x) => (T[N,4] y) <bool go = {1}> { y = Loop(n, go, x) <body = b (int64 i, bool c, T[N,4] p) => (bool d, T[N,4] q) { d = Identity(c) q = Add(p, p) }> }",
        feeds={"n": np.array(3)},
    ),
    *LOOPS,
    *VISION,
    Row("(T[N,4] x) => (T[N,4] y) { y = RandomUniformLike(x) }", expected=Unknown("FILL")),
    # quantization
    Row("(T[N,4] x) => (int8[N,4] y) <T s = {0.01}, int8 z = {0}> { y = QuantizeLinear(x, s, z) }", "float float16"),
    Row(
        "(T[N,4] x) => (T[N,4] y) <T s = {0.01}, int8 z = {0}> { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        FLOATS,
    ),
    Row(
        "(T[N,4] x) => (T[N,4] y) <T[4] s = {0.01, 0.02, 0.03, 0.04}, int8[4] z = {0, 0, 0, 0}> { q = QuantizeLinear<axis = 1>(x, s, z) y = DequantizeLinear<axis = 1>(q, s, z) }",
        "float float16",
        feeds={"x": NO_TIES},
    ),
    Row(
        "(T[N,4] x) => (T[N,4] y) <T s = {0.01}, int8 z = {3}> { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        expected=Refused("Non-zero zero point"),
    ),
    Row(
        "(T[N,4] x) => (uint8[N,4] y) <T s = {0.01}, uint8 z = {128}> { y = QuantizeLinear(x, s, z) }",
        expected=Refused("Non-zero zero point"),
    ),
    Row(
        "(T[N,4] x) => (T[N,4] y) <T s = {0.01}, float8e4m3fn z = {0}> { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        "float float16",
    ),
    Row(
        "(T[N,4] x) => (T[N,2] y) <int8[2,4] w = {1, 2, 3, 4, -5, -6, -7, -8}, T[2] s = {0.5, 0.25}> { d = DequantizeLinear<axis = 0>(w, s) t = Transpose(d) y = MatMul(x, t) }",
        "float float16",
    ),
    *(Row(BLOCKS.replace("W[", f"{kind}["), FLOATS) for kind in ("int4", "int8")),
    Row(
        "(T[N,2] x) => (T[N,4] y) <float8e4m3fn[2,4] w = {1, 2, 3, 4, 65, 66, 190, 200}, T s = {0.5}> { d = DequantizeLinear(w, s) y = MatMul(x, d) }",
        "float float16",
    ),
    Row(
        "(int64[B,S] index) => (T[B,S,4] y) <int8[3,4] w = {1, 2, 3, 4, -5, -6, -7, -8, 9, 9, 9, 9}, T[3] s = {0.5, 0.25, 2}> { d = DequantizeLinear<axis = 0>(w, s) y = Gather(d, index) }",
        "float float16",
    ),
    Row(
        "(T[N,2] x) => (T[N,4] y) <uint4[2,4] w = {1, 2, 3, 4, 5, 6, 7, 8}, T[1,4] s = {0.5, 0.25, 1, 2}> { d = DequantizeLinear<axis = 0, block_size = 2>(w, s) y = MatMul(x, d) }",
        expected=Refused("convertOnnxWeights"),
    ),
    Row(
        "(float[N,4] x) => (uint8[N,4] y, float[] s, uint8[] z) { y, s, z = DynamicQuantizeLinear(x) }",
        expected=Refused("DynamicQuantizeLinear"),
    ),
    Row("(int8[N,4] x, int8[4,3] w) => (int32[N,3] y) { y = MatMulInteger(x, w) }", expected=Refused("MatMulInteger")),
    *ATTENTION,
    # com.microsoft
    Row(
        "(T[N,8] x, T[8] w) => (T[N,8] y) { y = com.microsoft.SimplifiedLayerNormalization<axis = -1, epsilon = 0.01>(x, w) }",
        "float float16",
        reference="(T[N,8] x, T[8] w) => (T[N,8] y) { y = RMSNormalization<epsilon = 0.01>(x, w) }",
    ),
    Row(
        "(T[N,S,8] x, T[N,S,8] r, T[8] w) => (T[N,S,8] y) { y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.01>(x, r, w) }"
    ),
    Row("(T[N,4] x) => (T[N,4] y) { y = com.microsoft.Gelu(x) }"),
    Row("(T[N,4] x) => (T[N,4] y) { y = com.microsoft.QuickGelu(x) }", expected=Refused("no operator QuickGelu")),
    Row(
        "(T[B,S,16] x, int64[B,S] p, T[P,4] cos, T[P,4] sin) => (T[B,S,16] y)"
        "{ y = com.microsoft.RotaryEmbedding<num_heads = 0>(x, p, cos, sin) }",
        expected=Dies("SIGFPE"),
    ),
    Row(
        "(T[B,S,16] x, int64[B,S] position_ids, T[P,4] cos, T[P,4] sin) => (T[B,S,16] y)"
        "{ y = com.microsoft.RotaryEmbedding<num_heads = 2>(x, position_ids, cos, sin) }",
        reference="(T[B,S,16] x, int64[B,S] position_ids, T[P,4] cos, T[P,4] sin) => (T[B,S,16] y)"
        "{ y = RotaryEmbedding<num_heads = 2>(x, cos, sin, position_ids) }",
    ),
]
