"""What onnxruntime's CUDA provider has kernels for, and computes wrongly: the table that benchmarks/cuda_kernels makes on a
GPU, read on any machine."""

import json
from functools import cache
from pathlib import Path

from onnx import TensorProto, defs

TABLE = Path(__file__).with_suffix(".json")
NAMES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


@cache
def table() -> dict:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def has_kernel(op: str, opset: int, dtype: int) -> bool | None:
    """Whether the standard operator has one at this opset for this ONNX type; None where the table does not say."""
    try:
        version = str(defs.get_schema(op, opset).since_version)
    except defs.SchemaError:
        return None
    return table()["kernels"].get(op, {}).get(version, {}).get(NAMES.get(dtype))


def had_kernel(op: str, opset: int, dtype: int) -> int | None:
    """The opset from which on the operator has none any more, where it had one before; None where it never had."""
    versions = {int(version): types for version, types in table()["kernels"].get(op, {}).items() if int(version) <= opset}
    last = max((version for version, types in versions.items() if types.get(NAMES.get(dtype))), default=None)
    return None if last is None else min((version for version in versions if version > last), default=None)


def attention_is_wrong(dtype: int, head_dim: int, grouped: bool, causal: bool = False, masked: bool = False) -> bool:
    """Whether Attention gives wrong outputs for this head_dim in this ONNX type, from some number of keys on."""
    form = ", ".join(name for name, holds in (("grouped", grouped), ("causal", causal), ("masked", masked)) if holds)
    return str(head_dim) in table()["attention"].get(form or "plain", {}).get(NAMES.get(dtype, ""), {})
