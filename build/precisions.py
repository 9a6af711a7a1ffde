"""Which compute capabilities have the small types that a graph is quantised to."""

import onnx
from onnx import TensorProto

from suture.core.errors import UserError

# The first that has arithmetic, or kernels that widen weights, for the type (TensorRT's support matrix).
FIRST = {
    TensorProto.INT8: ("int8", (7, 5)),
    TensorProto.INT4: ("int4", (8, 0)),
    TensorProto.FLOAT8E4M3FN: ("fp8", (8, 9)),
    TensorProto.FLOAT4E2M1: ("fp4", (12, 0)),
}


def supported(proto: onnx.ModelProto, model: object, capabilities: tuple[str, ...], asked: bool) -> tuple[str, ...]:
    """Those of `capabilities` ("8.9") that have all types of the graph. Raises UserError where one that was `asked` for
    does not, or where none is left."""
    for kind, first in sorted(_types(proto)):
        lacking = [each for each in capabilities if _number(each) < first]
        left = tuple(each for each in capabilities if each not in lacking)
        if lacking and (asked or not left):
            wrong = f"is quantised to {kind}, which compute capability {', '.join(lacking)} does not have"
            least = ".".join(map(str, first))
            raise UserError(model, wrong, f"name {least} or later with --compute-capability, or quantise to another type")
        if lacking:
            print(f"build: note: not for {', '.join(lacking)}, which has no {kind}")
        capabilities = left
    return capabilities


def _types(proto: onnx.ModelProto) -> set[tuple[str, tuple[int, int]]]:
    """The quantised types of weights, caches and zero points, and the first compute capability of each."""
    types = {tensor.data_type for tensor in proto.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in proto.graph.input}
    return {FIRST[each] for each in types if each in FIRST}


def _number(capability: str) -> tuple[int, int]:
    major, minor = capability.split(".")
    return int(major), int(minor)
