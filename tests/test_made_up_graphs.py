"""Graphs of every kind that once went wrong, none of them anybody's file: what becomes of each, without a traceback or a
difference that is not said."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks.foreign import FUSED, KEPT, NOT_PARSED, REFUSED, UNPROVEN, judge

pytestmark = pytest.mark.usefixtures("one_thread")
QKV = "(float[B,2,S,8] q, float[B,2,T,8] k, float[B,2,T,8] v"
SELF = QKV.replace("T", "S")
OPSET, CONTRIB = '"": 24', '"": 18, "com.microsoft": 1'
PICTURE = "(float[B,3,7,10] x) => (float[B,3,p,q] y)"
NO_ROWS = "inconsistent q_sequence_length"  # onnxruntime's Attention takes no mask of one row for all


def model(text: str, imports: str = OPSET, **weights: np.ndarray) -> onnx.ModelProto:
    made = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{imports}]> g {text}")
    made.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in weights.items())
    return made


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def packed(attributes: str, inputs: str = "x,w,b", more: str = "", outputs: str = "y", declared: str = "") -> onnx.ModelProto:
    """onnxruntime's Attention."""
    text = f"(float[2,S,16] x{more}) => (float[2,S,16] y{declared}) {{ {outputs} = com.microsoft.Attention<{attributes}>({inputs}) }}"
    return model(text, CONTRIB, w=normal(16, 48), b=normal(48))


def embedded(segments: bool) -> onnx.ModelProto:
    """EmbedLayerNormalization, with segments or without."""
    given, table = ("seg", "se") if segments else ("", "")
    text = f"""(int32[B,S] ids{", int32[B,S] seg" if segments else ""}, int32[B,S] mask) => (float[B,S,8] y, int32[B] m) {{
    y, m = com.microsoft.EmbedLayerNormalization<epsilon = 0.01>(ids, {given}, we, pe, {table}, g, b, mask) }}"""
    more = {"se": normal(2, 8)} if segments else {}
    return model(text, CONTRIB, we=normal(9, 8), pe=normal(12, 8), g=normal(8), b=normal(8), **more)


def untyped_output() -> onnx.ModelProto:
    made = model("(float[B,8] x) => (float[B,8] y) { y = Relu(x) }")
    made.graph.output[0].ClearField("type")
    return made


def attention(attributes: str = "", inputs: str = "q,k,v", more: str = "", head: str = SELF, size: int = 8, **weights):
    head = head.replace(",8]", f",{size}]")
    return model(
        f"{head}{more}) => (float[B,2,S,{size}] y) {{ y = Attention<{attributes}>({inputs}) }}".replace("<>", ""), **weights
    )


EMPTY_ROW = np.array([[False] * 4, [True] * 4, [False, True, True, False]])
ROWS = QKV.replace("T", "4").replace("S", "3")
POOL = "MaxPool<kernel_shape = [3,3], strides = [2,2], ceil_mode = 1"
AVERAGE = POOL.replace("Max", "Average")
GRAPHS = {  # what, what becomes of it, and a part of the reason
    "a causal Attention with a mask": (attention("is_causal = 1, scale = 0.2", "q,k,v,m", ", bool[S,S] m"), KEPT, ""),
    "value heads of another size": (
        model("(float[B,4,S,24] q, float[B,4,S,24] k, float[B,4,S,16] v) => (float[B,4,S,16] y) "
              "{ y = Attention<is_causal = 1>(q,k,v) }"), KEPT, ""),
    "the scores as an output, capped": (
        model(QKV + ") => (float[B,2,S,8] y, float[B,2,S,T] w) "
              "{ y,,,w = Attention<qk_matmul_output_mode = 3, softcap = 2.0>(q,k,v) }"), NOT_PARSED, "softcap"),
    "grouped heads of rank 3, capped": (
        model("(float[B,S,32] q, float[B,S,16] k, float[B,S,16] v) => (float[B,S,32] y) "
              "{ y = Attention<softcap = 5.0, is_causal = 1, q_num_heads = 4, kv_num_heads = 2>(q,k,v) }"), KEPT, ""),
    "a mask of one row": (attention("", "q,k,v,m", ", float[B,1,1,T] m", QKV), UNPROVEN, NO_ROWS),
    "grouped heads in the rows": (
        model("(float[B,2,4,8] q, float[B,2,T,8] k, float[B,2,T,8] v, float[1,T] m) => (float[B,2,4,8] y) <float s = {0.35}> "
              "{ t = Transpose<perm = [0,1,3,2]>(k) a = MatMul(q,t) b = Mul(a,s) d = Add(b,m) p = Softmax(d) y = MatMul(p,v) }"),
        FUSED, "1 Attention"),
    "every axis of one name": (attention("is_causal = 1", head="(float[B,S,S,8] q, float[B,S,S,8] k, float[B,S,S,8] v".replace(
        "B,S,S", "B,2,S")), KEPT, ""),
    "axes without names": (
        model("(float[?,2,?,8] q, float[?,2,?,8] k, float[?,2,?,8] v) => (float[?,2,?,8] y) { y = Attention<is_causal = 1>(q,k,v) }"),
        KEPT, ""),
    "fixed shapes": (
        model("(float[2,2,7,8] q, float[2,2,7,8] k, float[2,2,7,8] v, bool[2,1,7,7] m) => (float[2,2,7,8] y) "
              "{ y = Attention(q,k,v,m) }"), KEPT, "rows that a mask lets see nothing"),
    "inputs called as a picture and a mask are": (
        model("(float[B,2,S,8] pixel_values, float[B,2,S,8] key, float[B,2,S,8] value, bool[B,1,S,S] attention_mask) "
              "=> (float[B,2,S,8] present) { present = Attention(pixel_values,key,value,attention_mask) }"), KEPT, ""),
    "an input called as a cache is": (
        model('(float[B,2,S,8] "past_key_values.0.key", float[B,2,S,8] k) => (float[B,2,S,8] y) '
              '{ y = Add("past_key_values.0.key",k) }'), KEPT, ""),
    "a constant mask with a row that sees nothing": (attention("", "q,k,v,m", "", ROWS, m=EMPTY_ROW), KEPT, ""),
    "minus infinity where nothing is seen": (
        model(QKV + ", bool[B,1,1,T] m) => (float[B,2,S,8] y) <float z = {0}> { b = Where(m,z,low) "
              "t = Transpose<perm = [0,1,3,2]>(k) a = MatMul(q,t) d = Add(a,b) p = Softmax(d) y = MatMul(p,v) }",
              low=np.array(-np.inf, np.float32)), FUSED, "1 Attention"),
    "GridSample of opset 16": (
        model('(float[B,2,5,6] x, float[B,4,4,2] g) => (float[B,2,4,4] y) '
              '{ y = GridSample<mode = "bicubic", align_corners = 1, padding_mode = "border">(x,g) }', '"": 16'), KEPT, ""),
    "Softmax of opset 9": (model("(float[B,3,4] x) => (float[B,3,4] y) { y = Softmax<axis = 1>(x) }", '"": 9'), KEPT, ""),
    "opset 8, its weights no inputs": (
        model("(float[B,3,8,8] x) => (float[B,4,p,q] y) "
              "{ a = Conv(x,w) y = AveragePool<kernel_shape = [2,2], strides = [2,2]>(a) }", '"": 8', w=normal(4, 3, 3, 3)), KEPT, ""),
    "Upsample of opset 7": (
        model('(float[B,3,8,8] x) => (float[B,3,p,q] y) { y = Upsample<mode = "nearest", scales = [1.0,1.0,2.0,2.0]>(x) }', '"": 7'),
        KEPT, ""),
    "BatchNormalization of opset 8": (
        model("(float[B,4,8,8] x) => (float[B,4,8,8] y) { a = BatchNormalization(x,s,b,c,d) y = Relu(a) }", '"": 8',
              s=normal(4), b=normal(4), c=normal(4), d=np.abs(normal(4)) + 0.1), KEPT, ""),
    "a pool rounded up": (model(f"{PICTURE} {{ y = {POOL}>(x) }}", '"": 17'), KEPT, ""),
    "a padded pool rounded up": (
        model(f"{PICTURE} {{ y = MaxPool<kernel_shape = [2,2], strides = [3,3], pads = [1,1,0,0], ceil_mode = 1>(x) }}", '"": 17'),
        KEPT, ""),
    "a mean rounded up": (model(f"{PICTURE} {{ y = {AVERAGE}>(x) }}", '"": 17'), KEPT, ""),
    "a mean rounded up that counts its pads": (
        model(f"{PICTURE} {{ y = {AVERAGE}, pads = [1,1,1,1], count_include_pad = 1>(x) }}", '"": 17'), KEPT, ""),
    "a pool of any size rounded up": (
        model(f"(float[B,3,h,w] x) => (float[B,3,p,q] y) {{ y = {POOL}>(x) }}", '"": 17'), KEPT, ""),
    "a norm of two types": (
        model("(float16[B,8] x) => (float[B,8] y) { a = LayerNormalization(x,s,b) y = Mul(a,s) }", '"": 18', s=normal(8), b=normal(8)),
        KEPT, "mixes float and float16: a Cast"),
    "an output without a type": (untyped_output(), KEPT, ""),
    "two producers": (model("(float[B] x) => (float[B] y) { a = Relu(x) a = Neg(x) y = Add(a,x) }"), REFUSED, "there already"),
    "a contrib operator that is not imported": (
        model("(float[B,8] x) => (float[B,8] y) { a = com.microsoft.QuickGelu(x) y = Add(a,x) }", '"": 18'), FUSED, "1 Swish"),
    "Attention, one way": (packed("num_heads = 2, unidirectional = 1"), FUSED, "1 Attention"),
    "Attention, padding": (packed("num_heads = 2", "x,w,b,m", ", int32[2,S] m"), FUSED, "1 Attention"),
    "Attention, lengths": (packed("num_heads = 2", "x,w,b,m", ", int32[2] m"), FUSED, "1 Attention"),
    "Attention, a mask for each token": (packed("num_heads = 2", "x,w,b,m", ", int32[2,S,S] m"), FUSED, "1 Attention"),
    "Attention, scale and bias": (
        packed("num_heads = 2, scale = 0.3", "x,w,b,,,a", ", float[2,2,S,S] a"), FUSED, "1 Attention"),
    "Attention, a stacked past": (
        packed("num_heads = 2, unidirectional = 1", "x,w,b,,past", ", float[2,2,2,P,8] past", "y, present",
               ", float[2,2,2,T,8] present"), FUSED, "1 Attention"),
    "embeddings with segments": (embedded(True), FUSED, "1 LayerNormalization"),
    "embeddings without segments": (embedded(False), FUSED, "1 LayerNormalization"),
    "a greedy search": (
        model("(int64[2] x) => (int64[2] y) { y = com.microsoft.GreedySearch(x) }", CONTRIB), REFUSED, "com.microsoft.GreedySearch"),
    "InstanceNormalization of opset 22": (
        model("(float[B,8,6,6] x) => (float[B,8,6,6] y) { a = InstanceNormalization(x,s,b) y = Relu(a) }", '"": 22',
              s=normal(8), b=normal(8)), FUSED, "1 LayerNormalization"),
    "unidirectional over fewer keys": (
        model("(float[2,5,8] q, float[2,3,8] k, float[2,3,8] v) => (float[2,5,8] y) "
              "{ y = com.microsoft.MultiHeadAttention<num_heads = 2, unidirectional = 1>(q,k,v) }", CONTRIB), KEPT, "unidirectional"),
    "causal over a past, with more queries than new keys": (
        model("(float[2,2,5,8] q, float[2,2,2,8] k, float[2,2,2,8] v, float[2,2,1,8] a, float[2,2,1,8] b) => (float[2,2,5,8] y, "
              "float[2,2,3,8] c, float[2,2,3,8] d) { y,c,d = Attention<is_causal = 1>(q,k,v,,a,b) }"), KEPT, ""),
    "written out, with rows that see nothing": (
        model(ROWS + ") => (float[B,2,3,8] y) { t = Transpose<perm = [0,1,3,2]>(k) a = MatMul(q,t) d = Where(m,a,low) p = Softmax(d) "
              "y = MatMul(p,v) }", m=EMPTY_ROW, low=np.array(-1e9, np.float32)), KEPT, "rows that see nothing, and count"),
    "padding that is true where it hides": (
        model("(float[N,2,N,8] x, bool[N,1,1,N] padded) => (float[N,2,N,8] y) { t = Transpose<perm = [0,1,3,2]>(x) a = MatMul(x,t) "
              "d = Where(padded,low,a) p = Softmax(d) y = MatMul(p,x) }", low=np.array(-1e9, np.float32)), FUSED, "1 Attention"),
    "functions of its own": (
        onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 18, "own": 1]> g (float[B,8] x) => (float[B,8] y) '
              '{ a = own.gelu(x) y = own.gelu(a) } <opset_import: ["": 18], domain: "own"> gelu (x) => (y) { '
              "r = Constant<value_float = 1.41421356>() a = Div(x,r) b = Erf(a) o = Constant<value_float = 1.0>() d = Add(b,o) "
              "f = Mul(x,d) h = Constant<value_float = 0.5>() y = Mul(f,h) }"), FUSED, "2 Gelu"),
    "the standard by its long name": (
        model("(float[B,8] x) => (float[B,8] y) { a = ai.onnx.Gelu(x) y = Relu(a) }", '"ai.onnx": 20'), KEPT, ""),
    "a cycle": (model("(float[B] x) => (float[B] y) { a = Add(x,b) b = Neg(a) y = Add(a,b) }"), REFUSED, "form a cycle"),
    "a bias of another type": (
        model("(float16[B,4] x) => (float16[B,3] y) { y = Gemm(x,w,b) }", '"": 18', w=normal(4, 3).astype(np.float16), b=normal(3)),
        KEPT, "mixes float and float16: a Cast"),
    "padding that counts still": (
        packed("num_heads = 2, mask_filter_value = -3.0", "x,w,b,m", ", int32[2,S] m"), NOT_PARSED, ""),
    "heads of 144": (attention(size=144), KEPT, ""),
    "one tensor, joined": (
        model("(float[3,8] x) => (float[3,8] y) { a = Concat<axis = -2>(x) y = Relu(a) }"), KEPT, ""),
    "a mask of another type than its query": (
        model(QKV.replace("float[", "float16[") + ", float[B,1,S,T] m) => (float16[B,2,S,8] y) { y = Attention(q,k,v,m) }"),
        KEPT, ""),
    "valid lengths as an input": (
        model("(float[2,2,3,8] q, float[2,2,7,8] k, float[2,2,7,8] v, int64[2] n) => (float[2,2,3,8] y) "
              "{ y = Attention(q,k,v,,,,n) }"), KEPT, ""),
    "an If whose branches read no cache": (
        model("(float[B,8] x, bool c) => (float[B,8] y) { y = If(c) <then_branch = t () => (float[B,8] p) { p = Neg(x) }, "
              "else_branch = e () => (float[B,8] q) { q = Relu(x) }> }"), KEPT, "If if stays as it is"),
    "GEGLU": (
        model("(float[B,S,8] x) => (float[B,S,16] y) { a = MatMul(x,w) h,g = Split<axis = -1, num_outputs = 2>(a) e = Gelu(g) "
              "y = Mul(h,e) }", w=normal(8, 32)), KEPT, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_what_becomes_of_it(name):
    source, expected, reason = GRAPHS[name]
    result, why = judge(source)
    assert (result, reason in why) == (expected, True), why
