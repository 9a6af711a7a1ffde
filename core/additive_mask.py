"""What hides a slot in a mask that is added to attention's scores."""

import numpy as np
from onnx import TensorProto

# Finite, so that a sum with a score stays finite and a row that sees nothing is not NaN; below any score of its type, far
# enough that exp(score + HIDDEN - best) is 0.
HIDDEN = {
    TensorProto.FLOAT16: -6e4,
    TensorProto.BFLOAT16: -1e30,
    TensorProto.FLOAT: -1e30,
    TensorProto.DOUBLE: -1e30,
}
FAR_BELOW = -9e3  # a number at most this, in a graph that is read, hides: exporters write -1e4 (bfloat16 rounds it) and less


def hiding(visible: np.ndarray, dtype: int) -> np.ndarray:
    """What is added to scores: 0 where a slot is visible. As it is for an onnx.TensorProto type that is not a float."""
    return np.where(visible, 0.0, HIDDEN[dtype]) if dtype in HIDDEN else visible
