"""One process at a time, measured: seconds, memory, what it wrote, and whether it had to be stopped."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
POLL = 0.05  # seconds between looks at a process's memory


@dataclass
class Run:
    """Wall-clock seconds, seconds of all its threads, its largest resident set in bytes; None, or what went wrong."""

    seconds: float
    cpu_seconds: float
    peak: int
    failure: str | None


def measure(command: list[str], most_memory: int | None = None, most_seconds: float | None = None) -> Run:
    """Runs `command` in the project's folder, and stops it where its own memory (mapped files left out) or its time goes
    beyond what is allowed. wait4 gives one child's own resources; this process must stay small, for a child's peak begins
    with its parent's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        stopped: list[str] = []
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(child, done, stopped, most_memory, most_seconds))
        watch.start()
        _, status, usage = os.wait4(child.pid, 0)
        done.set()
        watch.join()
        child.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        failure = stopped[0] if stopped else _failure(child.returncode, errors.read())
    return Run(time.monotonic() - started, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss, failure)


def stage(name: str, *arguments: object) -> None:
    """Runs one of the project's commands, which must succeed; it says nothing but what goes wrong."""
    subprocess.run([sys.executable, "-m", name, *map(str, arguments)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _watch(
    child: subprocess.Popen, done: threading.Event, stopped: list[str], most_memory: int | None, most_seconds: float | None
) -> None:
    started = time.monotonic()
    while not done.wait(POLL):
        if most_memory and _own_memory(child.pid) > most_memory:
            stopped.append(f"stopped: beyond {most_memory / 1e9:.1f} GB")
        elif most_seconds and time.monotonic() - started > most_seconds:
            stopped.append(f"stopped: beyond {most_seconds:.0f} s")
        if stopped:
            os.kill(child.pid, signal.SIGKILL)
            return


def _own_memory(process: int) -> int:
    """Bytes of RssAnon; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def _failure(returncode: int, errors: str) -> str | None:
    if returncode == -signal.SIGKILL:
        return "killed: out of memory"
    return (errors.strip().splitlines() or [f"exit status {returncode}"])[-1] if returncode else None


def empty(folder: Path) -> Path:
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    return folder


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
