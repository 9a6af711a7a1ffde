"""Parsers' processes, which tests of one worker use one after the other: to load TensorRT takes longer than most files."""

import os
from subprocess import Popen
from typing import IO

from suture.core import child
from suture.core.network.parse import ParserProcess

Place = tuple[str, frozenset[tuple[str, str]]]


def keep_parsers() -> None:
    """A parser without plugins that is done leaves its process to the next one in the same folder and environment."""
    idle: list[tuple[Place, Popen, IO[str]]] = []
    places: dict[int, Place] = {}  # by process
    start, close = ParserProcess.start, ParserProcess.close

    def start_or_take(parser: ParserProcess) -> Popen:
        if parser.child is None and not parser.plugins:
            idle[:] = [each for each in idle if each[1].poll() is None]
            found = next((each for each in idle if each[0] == _place()), None)
            if found is not None:
                idle.remove(found)
                _, parser.child, parser.said = found
        if parser.child is None:
            places[start(parser).pid] = _place()
        return start(parser)

    def leave(parser: ParserProcess) -> None:
        if parser.child is None or parser.plugins:
            close(parser)
        else:
            idle.append((places[parser.child.pid], parser.child, parser.said))
            parser.child = None

    ParserProcess.start, ParserProcess.close = start_or_take, leave


def _place() -> Place:
    environment = {name: value for name, value in child.environment().items() if name != "PYTEST_CURRENT_TEST"}
    return os.getcwd(), frozenset(environment.items())
