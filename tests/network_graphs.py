"""A small decoder with a static cache, written by hand in the two forms: portable ONNX, and lowered for TensorRT.

Two layers, hidden 64, 4 heads and 2 key heads of 16, capacity 64, vocabulary 50. Faults go in one at a time.
"""

import numpy as np
import onnx
from onnx import numpy_helper

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, CAPACITY, VOCAB, FFN = 2, 64, 4, 2, 16, 64, 50, 96
CODES = {"float": 1, "float16": 10, "bfloat16": 16}

COMMON = """
  bs = Shape<end = 2>(input_ids)
  q_shape = Concat<axis = 0>(bs, q_heads)
  kv_shape = Concat<axis = 0>(bs, kv_heads)
  h_shape = Concat<axis = 0>(bs, hidden)
  s = Gather(bs, one)
  rows = Range(zero, s, one)
  write_column = Unsqueeze(write_indices, ones)
  slots_of_rows = Add(write_column, rows)
  h_0 = Gather(embedding, input_ids)
"""
LAYER = """
  n_{i} = RMSNormalization<epsilon = 0.000001>(h_{i}, norm_{i})
  x_{i} = Reshape(n_{i}, flat)
  qkv_{i} = Gemm<transB = 1>(x_{i}, w_qkv_{i}, b_qkv_{i})
  q2_{i}, k2_{i}, v2_{i} = Split<axis = 1>(qkv_{i}, parts)
  q4_{i} = Reshape(q2_{i}, q_shape)
  k4_{i} = Reshape(k2_{i}, kv_shape)
  v4_{i} = Reshape(v2_{i}, kv_shape)
  qt_{i} = Transpose<perm = [0, 2, 1, 3]>(q4_{i})
  kt_{i} = Transpose<perm = [0, 2, 1, 3]>(k4_{i})
  v_{i} = Transpose<perm = [0, 2, 1, 3]>(v4_{i})
  q_{i} = RotaryEmbedding(qt_{i}, cos, sin, position_ids)
  k_{i} = RotaryEmbedding(kt_{i}, cos, sin, position_ids)
  present_k_{i} = TensorScatter<axis = -2, mode = "linear">(past_k_{i}, k_{i}, WRITE)
  present_v_{i} = TensorScatter<axis = -2, mode = "linear">(past_v_{i}, v_{i}, WRITE)
  ATTENTION
  at_{i} = Transpose<perm = [0, 2, 1, 3]>(a_{i})
  a2_{i} = Reshape(at_{i}, flat)
  o2_{i} = Gemm<transB = 1>(a2_{i}, w_o_{i})
  o_{i} = Reshape(o2_{i}, h_shape)
  r_{i} = Add(h_{i}, o_{i})
  m_{i} = RMSNormalization<epsilon = 0.000001>(r_{i}, ffn_norm_{i})
  m2_{i} = Reshape(m_{i}, flat)
  gate_{i} = Gemm<transB = 1>(m2_{i}, w_gate_{i})
  up_{i} = Gemm<transB = 1>(m2_{i}, w_up_{i})
  silu_{i} = Swish(gate_{i})
  g_{i} = Mul(silu_{i}, up_{i})
  d2_{i} = Gemm<transB = 1>(g_{i}, w_down_{i})
  d_{i} = Reshape(d2_{i}, h_shape)
  h_{next} = Add(r_{i}, d_{i})
"""
HEAD = """
  n = RMSNormalization<epsilon = 0.000001>(h_{n}, norm)
  n2 = Reshape(n, flat)
  l2 = Gemm<transB = 1>(n2, head)
  l_shape = Concat<axis = 0>(bs, vocab)
  logits = Reshape(l2, l_shape)
"""
MASK = """
  seen = Unsqueeze(slots_of_rows, axes_1_3)
  allowed = LessOrEqual(slots, seen)
  mask = Where(allowed, nothing, hidden_slot)
"""
PORTABLE = "a_{i} = Attention<is_causal = 1>(q_{i}, present_k_{i}, present_v_{i}, , , , lengths)"
CAUSAL_ONLY = "a_{i} = Attention<is_causal = 1>(q_{i}, present_k_{i}, present_v_{i})"
SCALED = """qf_{i} = Cast<to = 1>(q_{i})
  qm_{i} = Mul(qf_{i}, scale)
  qs_{i} = Cast<to = CODE>(qm_{i})
  """
MASKED = SCALED + "a_{i} = trt.TRT_Attention<DECOMPOSABLE>(qs_{i}, present_k_{i}, present_v_{i}, mask)"
SWAPPED = SCALED + "a_{i} = trt.TRT_Attention<DECOMPOSABLE>(qs_{i}, present_v_{i}, present_k_{i}, mask)"
LENGTHS = (
    SCALED
    + 'a_{i} = trt.TRT_Attention<causal_kind = "lower_right", DECOMPOSABLE>(qs_{i}, present_k_{i}, present_v_{i}, , , lengths)'
)


def portable(dtype: str, attention: str = PORTABLE, **changes) -> onnx.ModelProto:
    return _decoder(dtype, COMMON + "lengths = Add(write_indices, s)\n", attention, **changes)


def lowered(dtype: str, attention: str = MASKED, mask: str = MASK, **changes) -> onnx.ModelProto:
    """`changes` go over the named constants; `write` is the index that the caches are written at."""
    extra = "lengths = Add(write_indices, s)\n" if attention == LENGTHS else mask
    return _decoder(dtype, COMMON + extra, attention, **changes)


def _decoder(dtype: str, body: str, attention: str, write: str = "write_indices", **changes) -> onnx.ModelProto:
    body += "late = Add(write_indices, one)\n" if write == "late" else ""
    for layer in range(LAYERS):
        text = LAYER.replace("WRITE", write).replace("ATTENTION", attention)
        body += text.replace("{i}", str(layer)).replace("{next}", str(layer + 1))
    body += HEAD.replace("{n}", str(LAYERS))
    body = body.replace("DECOMPOSABLE", f"TRT_decomposable = {int(dtype == 'float')}").replace("CODE", str(CODES[dtype]))
    cache = f"{dtype}[B,{KV_HEADS},{CAPACITY},{HEAD_DIM}]"
    pasts = ", ".join(f"{cache} past_{part}_{layer}" for layer in range(LAYERS) for part in "kv")
    presents = pasts.replace("past_", "present_")
    text = f"""<ir_version: 11, opset_import: ["" : 24, "trt" : 1]>
    decoder (int64[B,S] input_ids, int64[B,S] position_ids, int64[B] write_indices, {pasts})
    => ({dtype}[B,S,{VOCAB}] logits, {presents}) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    for name, array in (_constants(dtype) | changes).items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def _constants(dtype: str) -> dict[str, np.ndarray]:
    kind = onnx.helper.tensor_dtype_to_np_dtype(CODES[dtype])
    rng = np.random.default_rng(3)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(kind)

    angles = np.arange(CAPACITY)[:, None] / 100 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    constants = {
        "embedding": rng.standard_normal((VOCAB, HIDDEN)).astype(kind),
        "head": weight(VOCAB, HIDDEN),
        "norm": np.ones(HIDDEN, kind),
        "cos": np.cos(angles).astype(kind),
        "sin": np.sin(angles).astype(kind),
        "scale": np.float32(HEAD_DIM**-0.5),
        "nothing": np.zeros((), kind),
        "hidden_slot": np.asarray(-65504.0 if dtype == "float16" else -1e30).astype(kind),
        "slots": np.arange(CAPACITY)[None, None, None],
        "axes_1_3": np.array([1, 3]),
        "zero": np.array(0),
        "one": np.array(1),
        "ones": np.array([1]),
        "q_heads": np.array([HEADS, HEAD_DIM]),
        "kv_heads": np.array([KV_HEADS, HEAD_DIM]),
        "hidden": np.array([HIDDEN]),
        "vocab": np.array([VOCAB]),
        "flat": np.array([-1, HIDDEN]),
        "parts": np.array([HEADS, KV_HEADS, KV_HEADS]) * HEAD_DIM,
    }
    for i in range(LAYERS):
        constants |= {
            f"norm_{i}": (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(kind),
            f"ffn_norm_{i}": (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(kind),
            f"w_qkv_{i}": weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            f"b_qkv_{i}": weight((HEADS + 2 * KV_HEADS) * HEAD_DIM),
            f"w_o_{i}": weight(HIDDEN, HIDDEN),
            f"w_gate_{i}": weight(FFN, HIDDEN),
            f"w_up_{i}": weight(FFN, HIDDEN),
            f"w_down_{i}": weight(HIDDEN, FFN),
        }
    return constants
