"""What is rounded to 8 bits, such as a quantised cache: how far two that were computed apart may lie."""

import numpy as np

FP8_MANTISSA = 3  # bits of e4m3


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
