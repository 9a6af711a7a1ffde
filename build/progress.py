"""TensorRT's progress: nested phases, each of some steps, as one fraction."""

from dataclasses import dataclass


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Fraction:
    """How much of a build is done, from the events of trt.IProgressMonitor (0 to 1, never falling)."""

    def __init__(self):
        self.phases: dict[str, _Phase] = {}
        self.value = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self.phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, step: int) -> float:
        """The fraction after step `step` (from 0) of a phase."""
        if name in self.phases:
            self.phases[name].done = step + 1
            self.value = max(self.value, self._reached(name))
        return self.value

    def finish(self, name: str) -> None:
        self.phases.pop(name, None)

    def _reached(self, name: str | None) -> float:
        part = 0.0  # of one step of the enclosing phase
        while name in self.phases:
            phase = self.phases[name]
            part = min((phase.done + part) / phase.steps, 1.0)
            name = phase.parent
        return part
