"""A user's own pass: a Python file with a docstring and `run(graph: suture.surgery.graph.Graph) -> int`."""

import ast
import importlib.util
import sys
import sysconfig
import traceback
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from suture.core.errors import UserError
from suture.surgery.graph import Graph
from suture.surgery.passes import Pass, of_module

INSTALLED = tuple({sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")})


def load_pass(path: Path) -> Pass:
    """Raises UserError where there is no such file, or it is not a pass."""
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"--pass {path}", "no such Python file", "name a file with run(graph) -> int in it")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # of a name that ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # bytecode is taken for an edit of the same second and size
    try:
        _refuse_old_names(path)
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"--pass {path}", f"does not load ({type(error).__name__}: {error})", "correct the file") from error
    finally:
        sys.dont_write_bytecode = writes
    if not module.__doc__ or not callable(getattr(module, "run", None)):
        raise UserError(f"--pass {path}", "has no docstring or no run(graph) -> int", "add both")
    return replace(of_module(module), run=lambda graph: _run(path, module, graph))


def _run(path: Path, module: ModuleType, graph: Graph) -> int:
    """What the user's code raises, or returns in place of a number, is said with its line; how often it matched is noted."""
    try:
        matches = module.run(graph)
    except UserError:
        raise
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(module.__file__)
        ]
        place = f" in line {lines[-1]}" if lines else ""
        raise UserError(f"--pass {path}", f"raised {type(error).__name__}: {error}{place}", "correct the file") from error
    if not isinstance(matches, int):
        raise UserError(f"--pass {path}", f"returned {matches!r}, not how often it matched", "return a number")
    graph.notes.append(f"--pass {path}: {matches} {'match' if matches == 1 else 'matches'}")
    return matches


def files_read(path: Path) -> list[Path]:
    """The file of a pass that was loaded, and those of the modules that it imports, and these in turn: all that are no installed
    package's, and decide what the pass does as its own file does."""
    found = [path.resolve()]
    for file in found:  # which grows
        for name in _imports(file) - {"suture"}:
            module = getattr(sys.modules.get(name), "__file__", None) or ""
            if module.endswith(".py") and not module.startswith(INSTALLED) and not name.startswith("suture."):
                found += {Path(module).resolve()} - set(found)
    return [path, *found[1:]]


def _imports(path: Path) -> set[str]:
    """The modules, by the names that an import statement gives them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return names


def _refuse_old_names(path: Path) -> None:
    """`surgery` was a package of its own once; in a checkout it would be found, and every module of it be there twice."""
    if old := next((name for name in sorted(_imports(path)) if name.split(".")[0] == "surgery"), None):
        raise UserError(f"--pass {path}", f"imports {old}, which is suture.{old} now", f"import suture.{old}")
