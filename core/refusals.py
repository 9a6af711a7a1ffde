"""What libraries raise about a file becomes one UserError that names it."""

from collections.abc import Iterator
from contextlib import contextmanager

from suture.core.errors import UserError

OURS = (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)
LONGEST = 300  # characters of what a library says


class BrokenFile(ValueError):
    """What is wrong with a file, in words for its one line."""


@contextmanager
def refusals(where: object, what: str, remedy: str) -> Iterator[None]:
    """Around calls of a library that reads the file `where`: whatever it raises means that the file is `what`. Around code
    of ours it would make a fault of ours the user's."""
    try:
        yield
    except OURS:
        raise
    except BrokenFile as error:
        raise UserError(where, str(error), remedy) from None
    except UnicodeDecodeError:
        raise UserError(where, f"{what} (it holds a name that is not UTF-8)", remedy) from None
    except BaseException as error:  # libraries' errors share no base; a panic of one in Rust is not an Exception
        raise UserError(where, f"{what} ({said(error)})", remedy) from None


def said(error: BaseException) -> str:
    """What an exception says, on one line; of onnx.checker's also the node that it is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    node = "".join(f", {line.partition(' Name: ')[2]}" for line in lines[1:2] if " Name: " in line)
    return lines[0][:LONGEST] + node
