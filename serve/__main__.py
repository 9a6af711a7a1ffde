"""suture serve OUT [--host ADDRESS] [--port N] [--rows N] [--api-key KEY] ...: OpenAI's API over HTTP.

Logs are JSON lines on standard error. Ends with SIGTERM or SIGINT once the answers that are on their way have ended; a second
one ends it at once.
"""

import importlib.util
import sys

from suture.core.command import DONE, run
from suture.core.errors import UserError
from suture.core.third_party import let_threads_sleep
from suture.serve.options import parse


def main(arguments: list[str] | None = None, prog: str = "serve") -> int:
    options = parse(arguments, prog)
    if options.write_triton is not None:
        from suture.serve.triton import write_repository

        print(f"serve: {write_repository(options)}", file=sys.stderr)
        return DONE
    for name in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise UserError("serve", f"{name} is not installed", "pip install 'suture[serve]', or -r requirements-serve.txt")
    let_threads_sleep()
    from suture.serve.listening import Server, listen  # here: torch, onnxruntime and starlette take seconds
    from suture.serve.loading import assemble

    application = assemble(options, lambda state: print(f"serve: {state}", file=sys.stderr, flush=True))
    socket = listen(options.host, options.port)
    address = f"http://{options.host}:{socket.getsockname()[1]}"
    print(f"serve: {address}, the model is called {application.name}; loading", file=sys.stderr, flush=True)
    worker = application.worker
    worker.start()
    Server(application.starlette, worker, options.drain_seconds).run(sockets=[socket])
    worker.stop()
    if worker.fault is not None:
        raise worker.fault
    return DONE


if __name__ == "__main__":
    run("serve", main)
