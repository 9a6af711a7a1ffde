"""How far results may be apart, as part of the largest value that the reference has, and what rounding alone explains.

float16 has 11 bits, and its rounding adds up over layers; bfloat16 has 8.
"""

from collections.abc import Iterable

import numpy as np
from onnx import TensorProto

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
SAME_GRAPH = {FLOAT: 1e-5, FLOAT16: 1e-2, BFLOAT16: 5e-2}  # one run of one graph, by another library
REWRITTEN = {FLOAT: 1e-4, FLOAT16: 2e-2, BFLOAT16: 5e-2}  # a graph and what was made of it, step after step
ROUNDED = 0.1  # where activations are rounded to 8 bits: one that lies half-way goes either way, and later layers amplify it
FP8_MANTISSA = 3  # bits of e4m3


def between_sessions(dtypes: Iterable[int]) -> float:
    """Of a rewritten graph, both sides in onnxruntime on the CPU, which compute in these onnx.TensorProto types. Where all are
    bfloat16, both run as float32 shadow copies with the same weights: nothing is rounded that the other does not round."""
    known = set(dtypes) & REWRITTEN.keys()
    return REWRITTEN[FLOAT] if known <= {BFLOAT16} else max(REWRITTEN[dtype] for dtype in known)


def marked(array: np.ndarray) -> np.ndarray:
    """A quantised cache in a type that says so and that arithmetic has: int8 as int16, fp8 as float16; others as float32."""
    return array.astype({"int8": np.int16, "float8_e4m3fn": np.float16}.get(array.dtype.name, np.float32))


def rounding_step(values: np.ndarray) -> float:
    """How far what lies half-way between two of a quantised cache's numbers may come out apart: the distance of two
    neighbours, for fp8 at its largest value."""
    if values.dtype == np.float16:
        largest = float(np.abs(values).max(initial=0.0, where=np.isfinite(values)))
        return 2.0 ** (np.floor(np.log2(max(largest, 2.0**-6))) - FP8_MANTISSA)
    return 1.0 if values.dtype == np.int16 else 0.0


def scale(recorded: float, found: float) -> float:
    """What an error is a share of, where one side's largest value is only written down: the smaller, unless it is 0."""
    return min(filter(None, (recorded, found)), default=1.0)
