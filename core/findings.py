"""What an audit of a graph or of a network finds."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Finding:
    severity: str  # "error", "warning" or "note"
    where: str  # the ONNX node, tensor, input or weight
    what: str
    remedy: str
    kind: str = ""  # "dropped" (no layer implements it), "misread" (it means something else), "attention", "cache", "weights"

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


def together(findings: Iterable[Finding]) -> list[Finding]:
    """The same, what is said of several places said once."""
    places: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        places.setdefault((finding.severity, finding.what, finding.remedy), []).append(finding)
    return [
        replace(first, where=f"{first.where} and {len(others)} more") if others else first for first, *others in places.values()
    ]
