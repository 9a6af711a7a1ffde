"""What an audit of a graph or of a network finds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    severity: str  # "error", "warning" or "note"
    where: str  # the ONNX node, tensor, input or weight
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"
