"""The formats that a weight, a product or a cache can be stored in, and which TensorRT has them where.

All are symmetric, the only kind that TensorRT's parser takes: a value is q · scale, with no zero point.
"""

from dataclasses import dataclass

BLOCKS = (16, 32, 64, 128, 256)  # sizes that both TensorRT and onnxruntime have kernels for


@dataclass(frozen=True)
class Values:
    """A type to round to: q lies in [least, largest], and scales are such that the largest number becomes `largest`."""

    name: str  # of the onnx.TensorProto type
    least: float
    largest: float
    bits: int

    @property
    def dtype(self) -> int:
        from onnx import TensorProto  # only here: a command line reads the formats' names for --help

        return TensorProto.DataType.Value(self.name)


INT8 = Values("INT8", -128, 127, 8)
INT4 = Values("INT4", -8, 7, 4)
FP8 = Values("FLOAT8E4M3FN", -448, 448, 8)


@dataclass(frozen=True)
class Format:
    """How a product with a weight is quantised."""

    values: Values
    blocks: bool = False  # one scale for each block of inputs, else one for each output
    activations: bool = False  # what is multiplied is rounded to the same type, with one scale, known beforehand
    balance: str | None = None  # how scales are moved between activations and weights: "awq" or "smoothquant"

    @property
    def calibrated(self) -> bool:
        return self.activations or self.balance is not None


FORMATS = {
    "int8": Format(INT8),
    "int4": Format(INT4, blocks=True),
    "int4-awq": Format(INT4, blocks=True, balance="awq"),
    "int8-smoothquant": Format(INT8, activations=True, balance="smoothquant"),
    "fp8": Format(FP8, activations=True),
}
HEADS = {"none": None, "int8": Format(INT8), "int4": Format(INT4, blocks=True)}  # of the vocabulary: weights alone
TABLES = {"none": None, "int8": INT8}
CACHES = {"none": None, "int8": INT8, "fp8": FP8}
