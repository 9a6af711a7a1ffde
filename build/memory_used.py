"""How much memory this process has used: its largest resident set, and how much of that was anonymous (RssAnon).

Weights that lie in files are mapped, and the system evicts such pages where memory is short. Anonymous memory
must fit, and it is what suture.build.memory estimates. The system keeps no maximum of it, so a thread looks now and then.
"""

import resource
import threading
from pathlib import Path

SECONDS = 0.02  # between two looks
STATUS = Path("/proc/self/status")


class Memory:
    """Watches from now on, in a thread of its own."""

    def __init__(self):
        self.anonymous = 0
        self.done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def peaks(self) -> dict[str, int | None]:
        """Ends the watch. Bytes; anonymous memory is None where the system does not report it."""
        self.done.set()
        return {
            # not ru_maxrss where it can be helped: that begins with the peak of the process this one came from
            "peak_memory_bytes": _status("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "peak_anonymous_bytes": self.anonymous or None,
        }

    def _watch(self) -> None:
        while not self.done.wait(SECONDS):
            self.anonymous = max(self.anonymous, _status("RssAnon"))


def _status(field: str) -> int:
    """Bytes; 0 where there is no such field."""
    try:
        return 1024 * int(STATUS.read_text(encoding="utf-8").split(f"{field}:")[1].split()[0])
    except (FileNotFoundError, IndexError):
        return 0
