"""TensorRT's progress: nested phases, each of some steps, as one fraction; shown as a bar, or as lines in a file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

QUARTER = 0.25


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


@contextmanager
def shown(title: str) -> Iterator[Callable[[str, float | None], None]]:
    """Yields show(what, fraction), where a fraction of None means that nobody knows.

    On a terminal it is a bar, elsewhere a line for each new `what` and each further quarter.
    """
    if not sys.stdout.isatty():
        yield _Lines(title).show
        return
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"), TimeElapsedColumn()
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=1.0, what="")
        yield lambda what, fraction: bar.update(
            task, what=what, completed=fraction or 0.0, total=None if fraction is None else 1.0
        )


class _Lines:
    def __init__(self, title: str):
        self.title, self.what, self.quarter = title, None, 0

    def show(self, what: str, fraction: float | None) -> None:
        quarter = int((fraction or 0) / QUARTER)
        if what != self.what:
            print(f"{self.title}: {what}", flush=True)
            self.what, self.quarter = what, quarter
        elif quarter > self.quarter:
            print(f"{self.title}: {what}, {fraction:.0%}", flush=True)
            self.quarter = quarter
