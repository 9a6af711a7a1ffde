"""A graph's inputs and outputs as the caller knows them, beside what surgery calls their axes.

Two axes of the same name need not be of the same size: names are the exporter's, and say what it was given. So while a graph
is worked on, every dynamic axis of its inputs has a symbol of its own, and nothing but the graph's own arithmetic makes two
alike. The names come back where the graph is written.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx


@dataclass
class SourceInterface:
    """`names`: by symbol, what the source called the axis ("" for one without a name). `outputs`: by output, the type and
    shape that the source declares for it; one that a pass gives another shape is to be taken out."""

    names: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, onnx.TypeProto] = field(default_factory=dict)


def separate(model: onnx.ModelProto, changing: Iterable[str] = ()) -> SourceInterface:
    """Gives every dynamic axis of the inputs a symbol of its own, and forgets those that the graph declares elsewhere.
    `changing`: outputs whose shape passes may change."""
    weights, names = {tensor.name for tensor in model.graph.initializer}, {}
    for value in model.graph.input:
        if value.name in weights or not value.type.HasField("tensor_type"):
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not _fixed(dim):
                symbol = f"{value.name}.{axis}"
                names[symbol] = dim.dim_param
                dim.dim_param = symbol
    outputs = {value.name: onnx.TypeProto() for value in model.graph.output if value.name not in set(changing)}
    for value in model.graph.output:
        if value.name in outputs:
            outputs[value.name].CopyFrom(value.type)
    for value in (*model.graph.output, *model.graph.value_info):
        _forget_symbols(value.type)
    return SourceInterface(names, {name: given for name, given in outputs.items() if _complete(given)})


def restore(model: onnx.ModelProto, interface: SourceInterface) -> None:
    """Puts the source's names back into the inputs and outputs."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
            if dim.dim_param in interface.names:
                name = interface.names[dim.dim_param]
                dim.Clear()
                if name:
                    dim.dim_param = name
    for value in model.graph.output:
        if value.name in interface.outputs:
            value.type.CopyFrom(interface.outputs[value.name])


def _fixed(dim: onnx.TensorShapeProto.Dimension) -> bool:
    return dim.HasField("dim_value") and dim.dim_value >= 0  # some write -1 for what is not known


def _complete(given: onnx.TypeProto) -> bool:
    """Whether it says all that onnx.checker asks for."""
    return given.tensor_type.HasField("shape") if given.HasField("tensor_type") else given.WhichOneof("value") is not None


def _forget_symbols(given: onnx.TypeProto) -> None:
    if given.HasField("tensor_type"):
        for dim in given.tensor_type.shape.dim:
            if not _fixed(dim):
                dim.Clear()
