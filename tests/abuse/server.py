"""Runs stages in forks of a process that has imported torch, onnxruntime and transformers, and run none of them.

A line of JSON comes in, {"module": ..., "name": ..., "arguments": [...], "seconds": ...}; one goes out, a Result's fields.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path

from tests.abuse.case import MODULES, Case, Result

IMPORTED = (
    "suture.build.__main__", "suture.export.__main__", "suture.generate.command", "suture.models.convert", "suture.models.llama",
    "suture.surgery.__main__", "transformers.models.auto", "suture.validate.__main__",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


class Server:
    """The process, as its user has it."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.abuse.server"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, case: Case, work: Path) -> Result:
        asked = {"module": MODULES.get(case.stage, case.stage), "arguments": case.command(work), "seconds": case.seconds}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Result(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    for module in IMPORTED:
        import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), file=answers, flush=True)


def _run(module: str, arguments: list[str], seconds: float) -> dict:
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        child = os.fork()
        if child == 0:
            _become(module, arguments, out.fileno(), err.fileno())
        status = None
        while time.monotonic() - started < seconds:
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.005)
        else:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return {"status": status, "out": out.read()[:10_000], "err": err.read()[:10_000], "seconds": time.monotonic() - started}


def _become(module: str, arguments: list[str], out: int, err: int) -> None:
    """The fork: python -m MODULE ARGUMENTS, as a process group of its own."""
    status = 1  # what Python ends with where nobody catches
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode, closefd=False) for fd, mode in enumerate("rww"))
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
