"""What tests of running processes share: starting them as a terminal does, waiting for them, the pipeline's command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.processes import measure

PROVEN, UNPROVEN = 300_000_000, 200_000_000  # bytes
ROOT = Path(__file__).resolve().parents[1]


def started(*command: object, **more: object) -> subprocess.Popen:
    """Python with these arguments, running, its streams as text. SIGINT ends it, also where the tests run in the background
    of a shell, which has what it starts there ignore that signal."""
    line = [sys.executable, *map(str, command)]
    restored = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(line, cwd=ROOT, text=True, preexec_fn=restored, **more)


def pipeline(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """pipeline.py, once it has ended."""
    command = [sys.executable, str(ROOT / "pipeline.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"} | environment)


def assert_little_memory(surgery: list[object]) -> None:
    """Of surgery with these arguments: its own memory while it proves what it did, torch's 0.15 GB among it; and the largest
    resident set without a proof, mapped weights and onnxruntime's check of the graph among it."""
    assert measure([sys.executable, "-m", "suture.surgery", *map(str, surgery)], most_memory=PROVEN).failure is None
    line = [*map(str, surgery), "--force", "--no-verify"]
    code = f"""
import re
from suture.surgery.__main__ import main
assert main({line!r}) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])"""  # ru_maxrss has the parent's, too
    done = started("-c", code, stdout=subprocess.PIPE)
    told, _ = done.communicate()
    assert done.returncode == 0
    assert int(told.split()[-1]) * 1024 < UNPROVEN


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def running_still(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(reached: Callable, seconds: float = 60):
    """What `reached` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.02)
    return found
