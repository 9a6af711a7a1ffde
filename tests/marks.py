"""Marks that follow from what a test does, so that nobody has to remember them: `exports` and `further`."""

import subprocess
import sys
from collections.abc import Iterator
from inspect import unwrap
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest

from suture.build import __main__ as build_main
from suture.build.process import build
from suture.core.network.parse import parse
from suture.export import stage as export_stage
from suture.export.trace import trace
from suture.runtime.network_decoder import open_network
from suture.validate.stage import validate_pipeline

LONG = (  # what takes seconds to run
    subprocess, export_stage, export_stage.export, trace, build_main, build, validate_pipeline, parse, open_network,
)  # fmt: skip
HERE = str(Path(__file__).resolve().parent)


def mark(items: list[pytest.Item]) -> None:
    """Marks with `exports` each test whose code, or a fixture's of it, mentions what exports or runs another stage that takes
    long, a process of its own among them, and with `further` each case of a test but its first."""
    known: dict[object, bool] = {}
    seen = set()
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        functions = (item.function, *(definition.func for definitions in fixtures for definition in definitions))
        if any(takes_long(function, known) for function in functions):
            item.add_marker("exports")
        test = item.nodeid.partition("[")[0]
        if test in seen:
            item.add_marker("further")
        seen.add(test)


def takes_long(each: object, known: dict[object, bool]) -> bool:
    """Whether what LONG names is mentioned by a function or class of the tests, or by one that it mentions."""
    if not isinstance(each, FunctionType | type):
        return any(each is one for one in LONG)
    if each in LONG or not _file(sys.modules.get(unwrap(each).__module__)).startswith(HERE):
        return each in LONG
    if each not in known:
        known[each] = False  # while those that it mentions are looked at
        mentioned = vars(each).values() if isinstance(each, type) else _mentioned(unwrap(each))
        known[each] = any(takes_long(value, known) for value in mentioned)
    return known[each]


def _mentioned(function: FunctionType) -> list[object]:
    """What the function's names stand for: its module's, and those of modules of the tests that it names."""
    names = set(_names(function.__code__))
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [each for each in found if isinstance(each, ModuleType) and _file(each).startswith(HERE)]
    return found + [vars(module)[name] for module in modules for name in names if name in vars(module)]


def _file(module: ModuleType | None) -> str:
    return getattr(module, "__file__", None) or ""


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
