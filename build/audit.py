"""What stops a build, and what it warns of beside what suture.core.network's audits find."""

import onnx

from suture.build.weights import Weight
from suture.core.errors import UserError
from suture.core.findings import Finding
from suture.core.network.advice import LOWER
from suture.core.tensors import references


def stop_on_errors(model: object, findings: list[Finding]) -> None:
    """Raises UserError with the first error and the number of further ones."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more like it)" if len(errors) > 1 else ""
        raise UserError(model, f"{errors[0].where}: {errors[0].what}{more}", errors[0].remedy)


def audit_bound_weights(proto: onnx.ModelProto, bound: list[Weight]) -> list[Finding]:
    """Matrices that stay constants of the engine though weights were to be its inputs."""
    names = {weight.name for weight in bound}
    return [
        Finding("warning", f"weight {tensor.name}", "stays a constant: no Gemm, MatMul or Gather takes it directly", LOWER)
        for tensor, _ in references(proto)
        if len(tensor.dims) >= 2 and tensor.name not in names
    ]
