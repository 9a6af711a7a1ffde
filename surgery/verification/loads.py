"""Whether onnx.checker and onnxruntime take a graph, looked at where surgery reads one and before it writes one: without its large
weights, so that it costs no memory."""

from pathlib import Path

import onnx

from suture.core.errors import UserError
from suture.core.onnx_checks import check_model
from suture.core.sessions import AS_GIVEN, NotLoaded, new_session
from suture.core.shadow_copy import runnable
from suture.core.traits import MICROSOFT, STANDARD

NOT_IMPLEMENTED = "NOT_IMPLEMENTED"  # valid, but without a kernel on a CPU


def check_source(source: onnx.ModelProto, where: object, root: Path) -> None:
    """Raises UserError where onnxruntime does not load it. `root`: the folder that its external weights are relative to, which are
    read only where it is refused without them: some operators take constants alone."""
    refusal = _refusal(_bare(source))
    if refusal and any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in source.graph.initializer):
        refusal = _refusal(runnable(source), root)
    if refusal:
        raise UserError(where, f"onnxruntime does not load it ({refusal})", "export it again")


def check_written(portable: onnx.ModelProto, where: object) -> None:
    """Raises RuntimeError where they do not take what surgery made of a source that they take: a fault of ours."""
    try:
        check_model(portable, where)
    except UserError as error:
        raise RuntimeError(f"the portable graph would be invalid: {error}") from None
    if refusal := _refusal(_bare(portable)):
        raise RuntimeError(f"onnxruntime would not load the portable graph: {refusal}")


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph, whose weights in other files are inputs."""
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
    return bare


def _refusal(model: onnx.ModelProto, root: Path | None = None) -> str | None:
    """What onnxruntime says of the graph's structure; None where it takes it, or knows nothing of its operators."""
    if {node.domain for node in model.graph.node} - {*STANDARD, MICROSOFT}:
        return None
    try:
        new_session(model, root, level=AS_GIVEN, mapped=True)
    except NotLoaded as error:
        said = str(error).splitlines()[0]
        return None if NOT_IMPLEMENTED in said else said.split(" : FAIL : ")[-1][:300]
    return None
