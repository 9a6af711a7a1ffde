"""Has TensorRT's parser read ONNX files in a child process: the parser can end its process by a signal.

Run as a program, this file is the child: `python -m suture.core.network.parse [PLUGIN_LIBRARY ...]`.
"""

import atexit
import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import onnx

from suture.core import child
from suture.core.command import end_with_parent
from suture.core.errors import UserError
from suture.core.network.description import Network, Refusal
from suture.core.network.walk import LARGE, NO_TENSORRT, NoTensorRT, Refused, describe, load_plugins
from suture.core.weights import weights_root

__all__ = [
    "LARGE",
    "NO_TENSORRT",
    "NoTensorRT",
    "ParserDied",
    "ParserProcess",
    "ParserRefused",
    "Refused",
    "describe",
    "parse",
    "shared_parser",
]
LENGTH = 8  # bytes in front of each message


class ParserRefused(UserError):
    """The parser takes the file to be no network: `refusals` says which nodes, and why."""

    def __init__(self, model: object, refusals: list[Refusal]):
        super().__init__(
            model, f"TensorRT's parser refuses it: {'; '.join(map(str, refusals))}", "rewrite that node, or leave it out"
        )
        self.refusals = refusals

    def __reduce__(self):
        return ParserRefused, (self.parts[0], self.refusals)


class ParserDied(UserError):
    """The parser ended its process by a signal."""

    def __reduce__(self):
        return ParserDied, self.parts


def parse(model: Path, graph: onnx.ModelProto | None = None, plugins: Sequence[Path] = ()) -> Network:
    """The network of the ONNX file `model`, or of a `graph` over that file's weights. Raises ParserRefused or ParserDied."""
    with ParserProcess(plugins) as parser:
        return parser.parse(model, graph)


@functools.cache
def shared_parser() -> "ParserProcess":
    """One for all files that this process has read, its child ended with it: loading TensorRT takes longer than most files."""
    parser = ParserProcess()
    atexit.register(parser.close)
    return parser


class ParserProcess:
    """The parser in one child process for any number of files; after one that kills it, the next starts another."""

    def __init__(self, plugins: Sequence[Path] = ()):
        self.plugins = [str(library.resolve()) for library in plugins]  # a bare name would be looked for where libraries lie
        self.child: subprocess.Popen | None = None

    def __enter__(self) -> "ParserProcess":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child, if there is one."""
        self._end()

    def parse(self, model: Path, graph: onnx.ModelProto | None = None, root: Path | None = None) -> Network:
        """As the function `parse`. `root`: the folder of the graph's weights, where that is not the file's."""
        data = model.read_bytes() if graph is None else graph.SerializeToString()
        stdin, stdout = _pipes(self.start())
        answer = None
        try:
            _send(stdin, (data, model, weights_root(model) if root is None else root))
            answer = _receive(stdout)
        except BrokenPipeError:
            pass
        if answer is None:
            status, said = self._end()
            if status < 0:
                died = signal.Signals(-status).name
                raise ParserDied(model, f"TensorRT's parser died of {died} reading it", "take out the node that it cannot take")
            last = (said.strip().splitlines() or ["no message"])[-1]
            raise UserError(model, f"TensorRT's parser did not finish: {last}", "look whether tensorrt is installed")
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, list):
            raise ParserRefused(model, answer)
        return answer

    def start(self) -> subprocess.Popen:
        """The child, started if there is none, and not waited for: loading TensorRT takes a while."""
        if self.child is not None:
            return self.child
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed with the child)
        self.child = subprocess.Popen(
            child.command("suture.core.network.parse", *self.plugins),
            env=child.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
        )
        return self.child

    def _end(self) -> tuple[int, str]:
        """Ends the child, if there is one. Returns its exit status and what it wrote to standard error."""
        if self.child is None:
            return 0, ""
        process, self.child = self.child, None
        stdin, stdout = _pipes(process)
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        stdout.close()
        status = process.wait()
        with self.said:
            self.said.seek(0)
            return status, self.said.read()


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
    """To its standard input and from its standard output."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the parser's process has no pipes")
    return process.stdin, process.stdout


def _send(pipe: IO[bytes], message: object) -> None:
    data = pickle.dumps(message)
    pipe.write(len(data).to_bytes(LENGTH, "little"))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    """None at the end of the stream. What comes was written by the other end of the pipe, this same program."""
    head = pipe.read(LENGTH)
    return pickle.loads(pipe.read(int.from_bytes(head, "little"))) if len(head) == LENGTH else None


def main(libraries: list[str]) -> None:
    """Answers each file on standard input with its network, its refusals, or an error."""
    end_with_parent()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what TensorRT prints is no answer
    wrong = {library: problem for library in libraries if (problem := load_plugins(library)) is not None}
    while (message := _receive(sys.stdin.buffer)) is not None:
        for library, problem in wrong.items():
            _send(out, UserError(library, f"TensorRT takes it for no plugin library: {problem}", "leave out --plugin"))
            break
        else:
            try:
                _send(out, describe(*message))
            except Refused as refused:
                _send(out, refused.refusals)
            except UserError as error:
                _send(out, error)


if __name__ == "__main__":
    main(sys.argv[1:])
