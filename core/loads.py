"""Whether onnxruntime loads a graph, asked without its large weights, so that it costs no memory."""

from pathlib import Path

import onnx

from suture.core.errors import UserError
from suture.core.sessions import AS_GIVEN, NotLoaded, new_session
from suture.core.shadow_copy import runnable
from suture.core.traits import MICROSOFT, STANDARD

NOT_IMPLEMENTED = "NOT_IMPLEMENTED"  # valid, but without a kernel on a CPU


def check_loads(model: onnx.ModelProto, where: object, root: Path) -> None:
    """Raises UserError where onnxruntime does not load it. `root`: the folder that its external weights are relative to, which are
    read only where it is refused without them: some operators take constants alone."""
    found = refusal(model)
    if found and any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        found = _said(runnable(model), root)
    if found:
        raise UserError(where, f"onnxruntime does not load it ({found})", "export it again")


def refusal(model: onnx.ModelProto) -> str | None:
    """What onnxruntime says of the graph's structure, its weights in other files made inputs; None where it takes it, or cannot know
    its operators."""
    bare = onnx.ModelProto.FromString(runnable(model).SerializeToString())
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


def _said(model: onnx.ModelProto, root: Path | None = None) -> str | None:
    if any(node.domain not in (*STANDARD, MICROSOFT) or node.op_type.startswith("TRT_") for node in model.graph.node):
        return None
    try:
        new_session(model, root, level=AS_GIVEN, mapped=True)
    except NotLoaded as error:
        said = str(error).splitlines()[0]
        return None if NOT_IMPLEMENTED in said else said.split(" : FAIL : ")[-1][:300]
    return None
