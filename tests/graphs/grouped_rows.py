"""A decoder of one layer whose query has something else than the step's tokens as rows, or a mask of fewer rows than it."""

import numpy as np
import onnx
from onnx import numpy_helper

HEADS, KV_HEADS, SIZE, VOCABULARY = 4, 2, 8, 32
HIDDEN = HEADS * SIZE
QUERIES = {
    "heads of a group": "qh = Reshape(q, apart)  qt = Transpose<perm = [0, 2, 1, 3]>(qh)  qg = Reshape(qt, groups)",
    "a projection seen as groups": "qg = Reshape(q, groups)",
    "tokens": "qh = Reshape(q, apart)  qg = Transpose<perm = [0, 2, 1, 3]>(qh)",
}
CAUSAL = "row = Unsqueeze(own, one)  visible = LessOrEqual(slots, row)"
LAST = "last = Sub(total, one)  visible = LessOrEqual(slots, last)  "  # one row, for all of the query's

TEXT = """<ir_version: 11, opset_import: ["": 18]> rows (int64[batch, sequence] input_ids,
    float[batch, {kv}, past, {size}] past_k_0, float[batch, {kv}, past, {size}] past_v_0)
  => (float[batch, sequence, {vocabulary}] logits, float[batch, {kv}, total, {size}] present_k_0,
    float[batch, {kv}, total, {size}] present_v_0)
  <int64[4] apart = {{0, 0, -1, {size}}}, int64[4] groups = {{0, {kv}, {group}, {size}}}, int64[1] one = {{1}},
   int64[3] joined = {{0, -1, {hidden}}}, float scale = {{0.5}}, float nothing = {{0.0}}, float hidden = {{-1e9}},
   int64 zero = {{0}}, int64 step = {{1}}> {{
  x = Gather(embed, input_ids)
  q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
  kh = Reshape(k, apart)  kn = Transpose<perm = [0, 2, 1, 3]>(kh)
  vh = Reshape(v, apart)  vn = Transpose<perm = [0, 2, 1, 3]>(vh)
  present_k_0 = Concat<axis = -2>(past_k_0, kn)
  present_v_0 = Concat<axis = -2>(past_v_0, vn)
  {query}
  steps1 = Shape<start = 1, end = 2>(input_ids)  steps = Squeeze(steps1)
  past1 = Shape<start = 2, end = 3>(past_k_0)  past0 = Squeeze(past1)
  total1 = Add(past1, steps1)  total = Identity(total1)  total0 = Squeeze(total1)
  slots = Range(zero, total0, step)  tokens = Range(zero, steps, step)  own = Add(tokens, past0)
  {mask}
  bias = Where(visible, nothing, hidden)
  {repeat}
  kt = Transpose<perm = [0, 1, 3, 2]>(keys)  raw = MatMul(qg, kt)  scaled = Mul(raw, scale)  scores = Add(scaled, bias4)
  weights = Softmax<axis = -1>(scores)  c = MatMul(weights, values)
  {context}
  o = MatMul(rows, wo)  y = Add(x, o)  logits = MatMul(y, head)
}}"""
REPEATED = """spread = Constant<value_ints = [1, 1, {group}, 1, 1]>()  two = Constant<value_ints = [2]>()
  ku = Unsqueeze(present_k_0, two)  ke = Expand(ku, spread)  keys = Reshape(ke, whole)
  vu = Unsqueeze(present_v_0, two)  ve = Expand(vu, spread)  values = Reshape(ve, whole)"""
NATIVE = "keys = Identity(present_k_0)  values = Identity(present_v_0)"


def decoder(query: str, mask: str = CAUSAL) -> onnx.ModelProto:
    """float32, random weights. `query`: of QUERIES, what its rows are; all but "tokens" run steps of one token alone."""
    group, tokens = HEADS // KV_HEADS, query == "tokens"
    context = "ct = Transpose<perm = [0, 2, 1, 3]>(c)  rows = Reshape(ct, joined)" if tokens else "rows = Reshape(c, joined)"
    ones = "axes = Constant<value_ints = [0, 1]>()  bias4 = Unsqueeze(bias2, axes)"
    flat = "flat = Constant<value_ints = [1, -1]>()  bias2 = Reshape(bias, flat)"
    flat = "bias2 = Identity(bias)" if mask == CAUSAL else flat
    repeat = REPEATED.format(group=group) if tokens else NATIVE
    sizes = {"kv": KV_HEADS, "size": SIZE, "group": group, "hidden": HIDDEN, "vocabulary": VOCABULARY}
    text = TEXT.format(query=QUERIES[query], mask=mask, repeat=f"{flat}  {ones}  {repeat}", context=context, **sizes)
    model = onnx.parser.parse_model(text)
    random, kv = np.random.default_rng(7), KV_HEADS * SIZE
    shapes = {"embed": (VOCABULARY, HIDDEN), "wq": (HIDDEN, HIDDEN), "wk": (HIDDEN, kv), "wv": (HIDDEN, kv)}
    for name, shape in (shapes | {"wo": (HIDDEN, HIDDEN), "head": (HIDDEN, VOCABULARY)}).items():
        values = (random.standard_normal(shape) * (1 if name == "embed" else HIDDEN**-0.5)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, HEADS, -1, SIZE]), "whole"))
    return model
