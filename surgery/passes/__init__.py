"""Passes: modules with a docstring that states the rewrite as a formula, and `run(graph) -> int`, the number of matches.

import_contrib   contrib operators of onnxruntime in the source to standard operators
portable         fusions that write the portable graph
lowering         forms that TensorRT's parser reads right and fast, from the portable graph
ort_contrib      the portable graph in onnxruntime's contrib operators, for its CUDA provider

suture.surgery.plan says which run, and in which order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from suture.surgery.options import SurgeryOptions


@dataclass(frozen=True)
class Pass:
    """`run(graph, **settings)`, where the options ask for it; in a Plan `run(graph)`."""

    name: str
    formula: str  # the first line of its docstring
    run: Callable[..., int]
    when: Callable[[SurgeryOptions], bool] = lambda options: True
    settings: Callable[[SurgeryOptions], dict[str, Any]] = lambda options: {}


@dataclass(frozen=True)
class Phase:
    """Passes that run in this order; with `repeated`, over and over until none of them matches any more."""

    name: str
    passes: tuple[Pass, ...]
    repeated: bool = False


def of_module(module: ModuleType, **asked: Callable) -> Pass:
    """The pass that a module has; `asked`: its `when` and `settings`."""
    formula = (module.__doc__ or "").strip().split("\n", 1)[0]
    return Pass(module.__name__.rsplit(".", 1)[-1], formula, module.run, **asked)


def phase(name: str, *passes: ModuleType | Pass, repeated: bool = False) -> Phase:
    return Phase(name, tuple(each if isinstance(each, Pass) else of_module(each) for each in passes), repeated)
