"""Random graphs of the operators that passes name: `draw` makes one, `judge` holds what surgery makes of it against it."""

import numpy as np
import onnx
from onnx import TensorProto

from benchmarks.draws.canvas import OPSETS, Canvas
from benchmarks.draws.contrib import CONTRIB
from benchmarks.draws.operators import STANDARD
from benchmarks.draws.patterns import PATTERNS

PARTS = (0.45, 0.2, 0.35)  # of draws: a standard operator, one of onnxruntime's, a form that passes rewrite
SAME_TYPE = ("Relu", "Tanh", "Neg", "Identity", "Sigmoid")


def draw(seed: int, index: int) -> Canvas:
    """The same graph for the same numbers."""
    rng = np.random.default_rng([seed, index])
    canvas = Canvas(rng, opset=int(rng.choice(OPSETS)), axes=str(rng.choice(["fixed", "own", "letters", "one", "unnamed"])))
    canvas.dtype = TensorProto.FLOAT if canvas.chance(0.8) else TensorProto.FLOAT16
    part = rng.choice(3, p=PARTS)
    if part == 2:
        function = PATTERNS[rng.integers(len(PATTERNS))]
        canvas.family = function.__name__
    else:
        table = (STANDARD, CONTRIB)[part]
        canvas.family = str(rng.choice(list(table)))
        function = table[canvas.family]
        canvas.family = ("", "com.microsoft.")[part] + canvas.family
    found = function(canvas)
    if not canvas.decoder:
        _surround(canvas, *(found if isinstance(found, tuple) else (found, canvas.dtype)))
    return canvas


def _surround(c: Canvas, result: str, dtype: int) -> None:
    """Something behind it, and now and then the tensor itself as an output, too, or something of its inputs."""
    if dtype in (TensorProto.FLOAT, TensorProto.FLOAT16):
        if c.chance(0.3):
            c.output(result, dtype)
        for _ in range(c.pick(0, 1, 1, 2)):
            form = c.pick("same", "same", "cast", "twice", "number")
            if form == "same":
                result = c.op(c.pick(*SAME_TYPE), result)
            elif form == "cast":
                result = c.op("Cast", result, to=dtype)
            elif form == "twice":
                result = c.op("Add", result, c.op("Tanh", result))
            else:
                number = np.array(c.pick(1.0, 0.5), onnx.helper.tensor_dtype_to_np_dtype(dtype))
                result = c.op("Mul", *[result, c.constant(number)][:: c.pick(1, -1)])
    c.output(result, dtype)
