"""Child processes that run a module of this package, however it is installed and whatever the working directory is."""

import os
import sys
from pathlib import Path

import suture


def command(module: str, *arguments: object) -> list[str]:
    """The command line that runs `python -m module`; -P keeps the working directory off the import path."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """This process's environment, with the folder that holds the package `suture` on the import path."""
    holder = str(Path(suture.__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [holder, os.environ.get("PYTHONPATH")]))}
