"""What torch's exporter writes inexactly in half precision, or of mixed types, written as torch computes it.

torch multiplies half-precision tensors by numbers that keep their own precision. The exporter rounds those to the tensor's
type: in bfloat16 the scale of attention, 1 / sqrt(128), which it spreads over query and key, would come out 0.3 % too
small, and the constants of GELU would be no longer GELU's. Tensors of several types that torch joins become the type that holds
all; the exporter joins them as they are, which no runtime takes (half-precision SDXL: the prompt beside sinusoids of sizes).
"""

import math
from collections.abc import Callable
from functools import reduce

import onnx_ir as ir
import torch
from onnxscript import opset18 as op

from suture.core.dtypes import of_torch, torch_dtype

FLOAT = ir.DataType.FLOAT
LEAST = torch.finfo(torch.float32).min


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """softmax(scale · query · keyᵀ + mask) · value, scores and softmax in float32; [B,H,S,D], [B,H,T,D], [B,H,T,D]."""
    if is_causal or enable_gqa:
        raise NotImplementedError("the models of this project give a mask, and as many key heads as query heads")
    scores = op.Cast(op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2])), to=FLOAT)
    scores = op.Mul(scores, _number(scale or 1 / math.sqrt(query.shape[3])))
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        scores = op.Where(attn_mask, scores, _number(LEAST))
    elif attn_mask is not None:
        scores = op.Add(scores, op.Cast(attn_mask, to=FLOAT))
    return op.MatMul(op.Cast(op.Softmax(scores, axis=-1), to=query.dtype), value)


def gelu(x, approximate="none"):
    """0.5 · x · (1 + erf(x / √2)), or with tanh(√(2/π) · (x + 0.044715 · x³)) instead."""
    wide = op.Cast(x, to=FLOAT)
    if approximate == "tanh":
        cubic = op.Add(wide, op.Mul(_number(0.044715), op.Pow(wide, _number(3.0))))
        function = op.Tanh(op.Mul(_number(math.sqrt(2 / math.pi)), cubic))
    else:
        function = op.Erf(op.Mul(wide, _number(1 / math.sqrt(2))))
    return op.Cast(op.Mul(op.Mul(wide, _number(0.5)), op.Add(function, _number(1.0))), to=x.dtype)


def cat(tensors, dim=0):
    """Tensors one behind another along `dim`; of no elements and one axis, torch leaves them out."""
    joined = [tensor for tensor in tensors if tensor is not None and tensor.shape != (0,)]
    if len(kinds := {tensor.dtype for tensor in joined}) > 1:
        widest = of_torch(reduce(torch.promote_types, (torch_dtype(int(kind)) for kind in kinds)))
        joined = [op.Cast(tensor, to=widest.onnx) for tensor in joined]
    return op.Concat(*joined, axis=dim) if len(joined) > 1 else op.Identity(joined[0])


def _number(value: float) -> ir.Tensor:
    return ir.tensor(value, dtype=FLOAT)


TABLE: dict[object, Callable] = {
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.aten.gelu.default: gelu,
    torch.ops.aten.cat.default: cat,
    torch.ops.aten.concat.default: cat,
    torch.ops.aten.concatenate.default: cat,
}
