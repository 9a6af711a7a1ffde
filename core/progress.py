"""What a stage is doing while it takes long: a bar on a terminal, lines elsewhere."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

QUARTER = 0.25
Item = TypeVar("Item")


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


def counted(title: str, what: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    """The items, `total` of them, shown as they are taken."""
    with shown(title) as show:
        for done, item in enumerate(items):
            show(what, done / total)
            yield item
        show(what, 1.0)


class _Lines:
    def __init__(self, title: str):
        self.title, self.quarter = title, 0
        self.what: str | None = None

    def show(self, what: str, fraction: float | None) -> None:
        quarter = int((fraction or 0) / QUARTER)
        if what != self.what:
            print(f"{self.title}: {what}", flush=True)
            self.what, self.quarter = what, quarter
        elif quarter > self.quarter:
            print(f"{self.title}: {what}, {fraction:.0%}", flush=True)
            self.quarter = quarter
