"""What validation is doing: a line that changes on a terminal, elsewhere one as each level begins and one as it ends."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from suture.validate.level import Level


class Progress:
    def __init__(self, console: Console):
        self.console, self.status = console, console.status("validate")

    def __enter__(self) -> "Progress":
        self.status.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.status.stop()

    def tell(self, what: str) -> None:
        """What happens now, within a level."""
        self.status.update(escape(f"validate: {what}"))

    def level(self, title: str, check: Callable[[], Level]) -> Level:
        """What `check` finds."""
        started = time.monotonic()
        self._say(f"{title} …")
        level = check()
        found = ", ".join(filter(None, (level.status, level.worst, level.reason)))
        self._say(f"{title}: {found} ({time.monotonic() - started:.1f} s)")
        return level

    def _say(self, line: str) -> None:
        if not self.console.is_terminal:
            self.console.print(f"validate: {line}", markup=False, highlight=False, soft_wrap=True)
