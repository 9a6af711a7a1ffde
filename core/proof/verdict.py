"""What a proof found, as it stands in surgery's manifest and report, from which validate takes it over."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, DIFFERENT, FAILED, NOT_RUN = "passed", "different", "failed", "not run"  # failed: what was to be compared is broken
TITLES = {2: "Exported ↔ portable graph", 3: "Portable graph ↔ TensorRT's network"}
COMPUTED = {2: "onnxruntime", 3: "TensorRT's network"}  # what the candidate of a level was computed in
FLOAT32 = "float32"


@dataclass
class StepErrors:
    """One set of inputs: the error of each output, of its largest value; None where there is none to give."""

    step: str
    errors: dict[str, float | None]

    @property
    def worst(self) -> float:
        return max((math.inf if error is None else error for error in self.errors.values()), default=0.0)


@dataclass
class DtypeComparison:
    """Both graphs in one type: "float32" (shadow copies, unless that is their own), "float16" or "bfloat16"."""

    dtype: str
    tolerance: float
    steps: list[StepErrors] = field(default_factory=list)

    @property
    def worst(self) -> float:
        return max((step.worst for step in self.steps), default=0.0)


@dataclass
class PairVerdict:
    """Level 2 or 3. `reason`: of what was not run or is broken; `difference`: what differs, and where that begins. `left_out`:
    what of it was not compared."""

    level: int
    status: str = NOT_RUN
    reason: str | None = None
    difference: str | None = None
    comparisons: list[DtypeComparison] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.level]

    @property
    def said(self) -> str:
        """In one line."""
        if self.status != PASSED:
            return f"{self.title}: {self.status}: {self.difference or self.reason}"
        worst = ", ".join(f"{each.worst:.1e} of {each.tolerance:.0e} in {each.dtype}" for each in self.comparisons)
        behind = f"; not compared: {'; '.join(self.left_out)}" if self.left_out else ""
        return f"{self.title}: equal (worst error {worst}){behind}"


@dataclass
class Proof:
    """Of what surgery wrote. `seconds`: how long it took."""

    pairs: list[PairVerdict]
    seconds: float = 0.0

    @property
    def status(self) -> str:
        statuses = {pair.status for pair in self.pairs}
        return next((each for each in (FAILED, DIFFERENT, PASSED) if each in statuses), NOT_RUN)

    @property
    def complete(self) -> bool:
        """Whether nothing was left out."""
        return all(pair.status == PASSED and not pair.left_out for pair in self.pairs)

    @property
    def headline(self) -> str:
        """For the line with which surgery ends."""
        if self.status in (FAILED, DIFFERENT):
            return "; ".join(pair.said for pair in self.pairs if pair.status in (FAILED, DIFFERENT))
        reasons = "; ".join(dict.fromkeys(f"{pair.title}: {pair.reason}" for pair in self.pairs if pair.status == NOT_RUN))
        if self.status == NOT_RUN:
            return f"not proven: {reasons}"
        behind = "; ".join(dict.fromkeys(each for pair in self.pairs for each in pair.left_out))
        first = [
            (COMPUTED[pair.level], pair.comparisons[0]) for pair in self.pairs if pair.comparisons
        ]  # as float32 shadow copies
        worst = ", ".join(f"{each.worst:.0e} in {where}" for where, each in first)
        parts = [f"proven in {self.seconds:.1f} s (worst error in float32: {worst})"]
        parts += [f"not compared: {behind}"] if behind else []
        return "; ".join([*parts, *([f"not proven: {reasons}"] if reasons else [])])

    def as_json(self) -> dict:
        found = asdict(self)
        for pair in found["pairs"]:
            for step in (step for comparison in pair["comparisons"] for step in comparison["steps"]):
                step["errors"] = {name: _number(error) for name, error in step["errors"].items()}
        return {"status": self.status, "complete": self.complete, **found}


class DifferenceFound(Exception):
    """What surgery wrote is not what it was made of."""

    def __init__(self, proof: Proof):
        super().__init__(proof.headline)
        self.proof = proof


def from_json(found: Any) -> Proof | None:
    """None where it is not proof."""
    try:
        pairs = [
            PairVerdict(
                **{
                    **pair,
                    "comparisons": [
                        DtypeComparison(each["dtype"], each["tolerance"], [StepErrors(**step) for step in each["steps"]])
                        for each in pair["comparisons"]
                    ],
                }
            )
            for pair in found["pairs"]
        ]
        return Proof(pairs, found["seconds"])
    except (TypeError, LookupError, AttributeError):
        return None


def _number(error: float | None) -> float | None:
    """For JSON, which has no infinity."""
    return float(f"{error:.3g}") if error is not None and math.isfinite(error) else None
