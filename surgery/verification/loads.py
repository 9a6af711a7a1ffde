"""Whether onnx.checker and onnxruntime take what surgery made, looked at before it is written."""

import onnx

from suture.core.errors import UserError
from suture.core.loads import refusal
from suture.core.onnx_checks import check_model


def check_written(portable: onnx.ModelProto, where: object) -> None:
    """Raises RuntimeError where they do not take what surgery made of a source that they take: a fault of ours."""
    try:
        check_model(portable, where)
    except UserError as error:
        raise RuntimeError(f"the portable graph would be invalid: {error}") from None
    if found := refusal(portable):
        raise RuntimeError(f"onnxruntime would not load the portable graph: {found}")
