"""What a part's graph takes and gives, as its manifest and parts.json have it and suture.core.parts reads it."""

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from suture.models.parts import Part, Port


def description(part: Part, graph: ir.Model) -> dict:
    """Name and kind, and by name each input and output: shape, dtype, below which integers lie, and which output of a part
    before it is."""
    inputs, outputs = _described(graph.graph.inputs, part.inputs), _described(graph.graph.outputs, part.outputs)
    for name, source in part.reads.items():
        inputs[name]["from"] = source
    return {"name": part.name, "kind": part.kind, "inputs": inputs, "outputs": outputs}


def _described(values: Iterable[ir.Value], ports: Mapping[str, Port]) -> dict[str, dict]:
    described = {}
    for value in values:
        shape = [size if isinstance(size, int) else size.value for size in value.shape]
        described[value.name] = {"shape": shape, "dtype": value.dtype.name}
        if value.name in ports and ports[value.name].below is not None:
            described[value.name]["below"] = ports[value.name].below
    return described
