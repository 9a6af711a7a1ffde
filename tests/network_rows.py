"""A row of the cases of TensorRT's network: a graph, its types, and what TensorRT makes of it."""

from dataclasses import dataclass, field

FLOATS = "float float16 bfloat16"
INTS = "int32 int64"


@dataclass(frozen=True)
class Agrees:
    """The network computes what onnxruntime computes."""


@dataclass(frozen=True)
class Refused:
    """The parser returns an error that says `why`."""

    why: str


@dataclass(frozen=True)
class Dies:
    """The parser's process ends by a signal."""

    signal: str


@dataclass(frozen=True)
class Differs:
    """The parser takes it, and means something else than ONNX: `why`."""

    why: str


@dataclass(frozen=True)
class Unknown:
    """The parser takes it, in layers that the evaluator does not know."""

    layers: str


@dataclass(frozen=True)
class Row:
    graph: str
    types: str = "float"
    expected: object = field(default_factory=Agrees)
    feeds: dict = field(default_factory=dict)
    reference: str | None = None  # the same computation for onnxruntime, where it does not know TensorRT's operator
