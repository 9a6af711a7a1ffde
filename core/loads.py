"""Whether onnxruntime loads a graph, asked without its large weights, so that it costs no memory."""

from pathlib import Path

import onnx

from suture.core.errors import UserError
from suture.core.sessions import AS_GIVEN, NotLoaded, new_session
from suture.core.shadow_copy import runnable
from suture.core.tensors import references
from suture.core.traits import MICROSOFT, STANDARD

NOT_IMPLEMENTED = "NOT_IMPLEMENTED"  # valid, but without a kernel on a CPU


def check_loads(model: onnx.ModelProto, where: object, root: Path) -> None:
    """Raises UserError where onnxruntime does not load it. `root`: the folder that its external weights are relative to, which are
    read only where it is refused without them: some operators take constants alone."""
    found = refusal(model)
    if found and any(True for _ in references(model)):
        found = _said(_constants_as_weights(runnable(model)), root)
    if found:
        raise UserError(where, f"onnxruntime does not load it ({found})", "export it again")


def refusal(model: onnx.ModelProto) -> str | None:
    """What onnxruntime says of the graph's structure, its weights in other files made inputs; None where it takes it, or cannot know
    its operators."""
    bare = _constants_as_weights(runnable(model))
    given = {value.name for value in bare.graph.input}
    kept = []
    for tensor in bare.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            kept.append(onnx.TensorProto.FromString(tensor.SerializeToString()))
        elif tensor.name not in given:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(kept)
    return _said(bare)


def _constants_as_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which a constant whose value lies in a file is a weight: onnxruntime looks for a node's in the working directory."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    nodes = list(copy.graph.node)
    del copy.graph.node[:]
    for node in nodes:
        value = next((each.t for each in node.attribute if node.op_type == "Constant" and each.name == "value"), None)
        if value is not None and value.data_location == onnx.TensorProto.EXTERNAL:
            copy.graph.initializer.append(value)
            copy.graph.initializer[-1].name = node.output[0]
        else:
            copy.graph.node.append(node)
    return copy


def _said(model: onnx.ModelProto, root: Path | None = None) -> str | None:
    if any(node.domain not in (*STANDARD, MICROSOFT) or node.op_type.startswith("TRT_") for node in model.graph.node):
        return None
    try:
        new_session(model, root, level=AS_GIVEN, mapped=True)
    except NotLoaded as error:
        said = str(error).splitlines()[0]
        return None if NOT_IMPLEMENTED in said else said.split(" : FAIL : ")[-1][:300]
    return None
