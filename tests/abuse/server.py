"""Runs stages in forks of a process that has imported torch, onnxruntime and transformers, and run none of them.

A line of JSON comes in, what _run takes; one goes out, a Result's fields.
"""

import builtins
import contextlib
import json
import multiprocessing
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
from typing import NoReturn

import onnx
import onnx_ir as ir

from tests.abuse.case import MODULES, Case, Result

IMPORTED = (
    "diffusers.loaders.single_file_utils", "diffusers.models.autoencoders", "diffusers.models.controlnets",
    "diffusers.models.unets",
    "diffusers.schedulers.scheduling_ddim", "transformers.models.clip", "transformers.models.clip.modeling_clip",
    "transformers.models.sam.modeling_sam",
    "suture.generate.masks", "suture.generate.pictures", "suture.models.families.stable_diffusion",
    "suture.models.families.sam",
    "suture.build.stage", "suture.export.stage", "suture.generate.command", "suture.models.pickles",
    "suture.models.families.llama",
    "suture.surgery.stage", "suture.validate.check", "suture.validate.stage", "transformers.models.auto",
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
        asked = {"module": MODULES.get(case.stage, case.stage), "arguments": case.command(work), "seconds": case.seconds,
                 "fault": case.fault, "stdout": case.stdout, "ended": case.ended, "environment": dict(case.environment),
                 "temporary": str(work.parent)}  # fmt: skip
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Result(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Forked(subprocess.Popen):
    """In subprocess.Popen's place: a module of ours runs in a fork of the stage, which has imported what it needs, unless
    the stage has other threads, whose locks a fork would keep."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                       p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest):  # fmt: skip
        if args[1:3] != ["-P", "-m"] or not single_threaded():
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest,
            )  # fmt: skip
        self._child_created = True
        self.pid = os.fork()
        if self.pid == 0:
            streams = [fd if fd != -1 else own for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
            _run_module(args[3], args[4:], streams, env or {}, close=True)
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def single_threaded() -> bool:
    return len(os.listdir("/proc/self/task")) == 1


def get_context(method: str | None = None) -> multiprocessing.context.BaseContext:
    """In multiprocessing.get_context's place, for the same reason."""
    return CONTEXT("fork" if method == "spawn" and single_threaded() else method)


CONTEXT = multiprocessing.get_context


class Ended:
    """In subprocess.Popen's place: a pipeline's stages that have ended, all with 0 but one."""

    stage, status = "", 0

    def __init__(self, command, **_):
        self.returned = Ended.status if f"suture.{self.stage}" in command else 0

    def wait(self, _=None) -> int:
        return self.returned

    def kill(self) -> None:
        pass


def main() -> None:
    for module in IMPORTED:
        import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), file=answers, flush=True)


def _run(module: str, arguments: list[str], seconds: float, stdout: str, **settings) -> dict:
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        child = os.fork()
        if child == 0:
            _become(module, arguments, _target(stdout, out.fileno()), err.fileno(), **settings)
        status = None
        while time.monotonic() - started < seconds:
            ended, code, used = os.wait4(child, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.005)
        else:
            os.killpg(child, signal.SIGKILL)
            *_, used = os.wait4(child, 0)
        out.seek(0)
        err.seek(0)
        return {"status": status, "out": out.read()[:10_000], "err": err.read()[:10_000], "cpu": used.ru_utime + used.ru_stime}


def _target(stdout: str, file: int) -> int | None:
    """The descriptor that the stage gets as its standard output."""
    if stdout == "unread":
        ours, theirs = os.pipe()
        os.close(ours)
        return theirs
    return {"": file, "full": os.open("/dev/full", os.O_WRONLY), "closed": None}[stdout]


def _become(
    module: str, arguments: list[str], out: int | None, err: int, fault, ended, environment: dict, temporary: str
) -> None:
    """The fork: python -m MODULE ARGUMENTS, as a process group of its own."""
    os.setsid()
    tempfile.tempdir = temporary
    subprocess.Popen, multiprocessing.get_context = Forked, get_context
    if fault:
        _plant(*fault)
    if ended:
        Ended.stage, Ended.status = ended
        subprocess.Popen = Ended
    _run_module(module, arguments, [os.open(os.devnull, os.O_RDONLY), out, err], environment)


def _run_module(
    module: str, arguments: list[str], streams: list[int | None], environment: dict[str, str], close: bool = False
) -> NoReturn:
    """Becomes python -m MODULE ARGUMENTS with these as its standard streams; `close`: no other file stays open."""
    status = 1  # what Python ends with where nobody catches
    try:
        os.environ |= environment
        for source, target in zip(streams, range(3)):
            if source is None:
                os.close(target)
            elif source != target:
                os.dup2(source, target)
        if close:
            os.closerange(3, 1024)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(fd, mode, closefd=False) if streams[fd] is not None else None for fd, mode in enumerate("rww")
        )
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)


WEAK = {  # mechanisms that do nothing: what the table must see
    "suture.core.tensors:inside": lambda root, location, where: Path(root, location),
    "suture.core.weights:check_outside": lambda proto, model, root: None,
    "suture.core.stage:Stage._check_folder": lambda self: None,
    "suture.generate.command:check_results": lambda results, read: None,
    "suture.core.identity:Contents._hash": lambda self, file, path, size: str(size),
    "suture.core.arguments:_within": lambda number, least, most, text: number,
    "suture.core.weights:check_model": lambda model, where: None,
    "suture.core.stage:remove": lambda folder, names: None,
    "suture.surgery.operate:check_loads": lambda model, where, root: None,
}


def traced(*_) -> "ir.Model":
    """In the tracer's place: one node over one of the checkpoint's weights, which has no values yet."""
    text = """<ir_version: 10, opset_import: ["": 18]> g (int64[b, s] input_ids, float[2304, 16] weight) => (float[b, s, 16] logits)
        { logits = Gather(weight, input_ids) }"""
    model = ir.serde.from_proto(onnx.parser.parse_model(text))
    weight = model.graph.inputs.pop()
    weight.name = "transformer.wte.weight"
    model.graph.initializers[weight.name] = weight
    return model


QUICK = {"suture.export.stage:trace": traced}
INSTEAD = {"WEAK": WEAK, "QUICK": QUICK}


def _plant(place: str, error: str) -> None:
    """Makes what is called at module:name raise this exception, or do as INSTEAD says where it has that."""
    module, _, path = place.partition(":")
    *above, name = path.split(".")
    holder = import_module(module)
    for each in above:
        holder = getattr(holder, each)

    def planted(*arguments, **named):
        raise getattr(builtins, error)("planted")

    if not callable(getattr(holder, name)):
        raise LookupError(f"{place} is not a function")
    setattr(holder, name, INSTEAD[error][place] if error in INSTEAD else planted)


if __name__ == "__main__":
    main()
