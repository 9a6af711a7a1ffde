"""Runs the build in a child process, because TensorRT's parser can die by a signal; shows what the child reports."""

import multiprocessing
import signal

import onnx

from suture.build.worker import Job, work
from suture.core.errors import UserError
from suture.core.network.advice import lowering_advice
from suture.core.progress import shown


def build(job: Job) -> dict:
    """Builds as `job` says and returns what the worker's `build` does. Raises UserError where the child dies."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit the parent's threads
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(job, sender), daemon=True)
    child.start()
    sender.close()  # so that the child's end is the only one, and its death ends the stream
    doing = "starting"
    try:
        with shown("build") as show:
            while True:
                kind, *values = receiver.recv()
                if kind == "done":
                    return values[0]
                if kind == "error":
                    raise values[0]
                doing, fraction = values
                show(doing, fraction)
    except EOFError:
        child.join()
        raise _death(job, doing, child.exitcode) from None
    finally:
        child.kill()
        child.join()


def _death(job: Job, doing: str, exitcode: int) -> Exception:
    if exitcode >= 0:
        return RuntimeError(f"{job.model}: the build process ended while {doing}, with status {exitcode}")
    name = signal.Signals(-exitcode).name
    if name == "SIGKILL":
        return UserError(
            job.model, f"the build was killed while {doing}, as the system does when memory is short",
            "free memory, give fewer profiles, or take --weights input",
        )  # fmt: skip
    remedy = lowering_advice(onnx.load(job.model, load_external_data=False))
    return UserError(job.model, f"TensorRT died of {name} while {doing}", remedy)
