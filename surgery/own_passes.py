"""A user's own pass: a Python file with a docstring and `run(graph: suture.surgery.graph.Graph) -> int`."""

import ast
import importlib.util
from pathlib import Path

from suture.core.errors import UserError
from suture.surgery.passes import Pass, of_module


def load_pass(path: Path) -> Pass:
    """Raises UserError where there is no such file, or it is not a pass."""
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"--pass {path}", "no such Python file", "name a file with run(graph) -> int in it")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # of a name that ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        _refuse_old_names(path)
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"--pass {path}", f"does not load ({type(error).__name__}: {error})", "correct the file") from error
    if not module.__doc__ or not callable(getattr(module, "run", None)):
        raise UserError(f"--pass {path}", "has no docstring or no run(graph) -> int", "add both")
    return of_module(module)


def _refuse_old_names(path: Path) -> None:
    """`surgery` was a package of its own once; in a checkout it would be found, and every module of it be there twice."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        if old := next((name for name in names if name.split(".")[0] == "surgery"), None):
            raise UserError(f"--pass {path}", f"imports {old}, which is suture.{old} now", f"import suture.{old}")
