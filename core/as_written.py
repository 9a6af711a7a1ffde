"""A graph in onnxruntime that computes what is written, on the CPU: what everything else is compared with."""

from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import helper

from suture.core.errors import UserError
from suture.core.layerwise import LayerwiseSession, is_large, with_products_by_rows
from suture.core.sessions import NotLoaded, new_session
from suture.core.shadow_copy import runnable


def open_session(model: onnx.ModelProto, root: Path, name: str) -> ort.InferenceSession | LayerwiseSession:
    """A CPU session that computes a graph as it is written: bfloat16 as float32, no fusion that changes numbers. Large graphs
    run by layers. Raises UserError, which calls the graph `name`."""
    if is_large(model):
        return LayerwiseSession(runnable(with_products_by_rows(model)), root)
    try:
        return new_session(at_full_accuracy(runnable(model)), root)
    except NotLoaded as error:
        raise UserError(name, f"onnxruntime cannot load it ({error})", "export it again") from None


def at_full_accuracy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose MatMulNBits keep their activations in float, which onnxruntime-genai's graphs let them round to int8."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for node in copy.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [each for each in node.attribute if each.name != "accuracy_level"]
            node.ClearField("attribute")
            node.attribute.extend([*kept, helper.make_attribute("accuracy_level", 1)])
    return copy
