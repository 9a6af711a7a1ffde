"""Whether onnx.checker and onnxruntime take a graph, looked at before it is written: without its large weights, so that it
costs no memory."""

import onnx

from suture.core.errors import UserError
from suture.core.onnx_checks import check_model
from suture.core.sessions import AS_GIVEN, NotLoaded, new_session
from suture.core.shadow_copy import runnable
from suture.core.traits import MICROSOFT, STANDARD

NOT_IMPLEMENTED = "NOT_IMPLEMENTED"  # valid, but without a kernel on a CPU


def check(portable: onnx.ModelProto, source: onnx.ModelProto, where: object) -> None:
    """Raises UserError where they do not take the source either, and RuntimeError where it takes that alone: then
    surgery made it invalid."""
    try:
        check_model(portable, where)
    except UserError as error:
        check_model(source, where)
        raise RuntimeError(f"the portable graph would be invalid: {error}") from None
    refusal = _refusal(portable)
    if refusal is None:
        return
    if _refusal(source) is not None:
        raise UserError(where, f"onnxruntime does not load it ({refusal})", "export it again")
    raise RuntimeError(f"onnxruntime would not load the portable graph: {refusal}")


def _refusal(model: onnx.ModelProto) -> str | None:
    """What onnxruntime says of the graph's structure; None where it takes it, or knows nothing of its operators."""
    if {node.domain for node in model.graph.node} - {*STANDARD, MICROSOFT}:
        return None
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
    try:
        new_session(bare, level=AS_GIVEN, mapped=True)
    except NotLoaded as error:
        said = str(error).splitlines()[0]
        return None if NOT_IMPLEMENTED in said else said.split(" : FAIL : ")[-1][:300]
    return None
