"""What `make check`, `make test`, `make slow` and the longer runs take. Three marks a test is given here:

exports     it exports, parses, builds, validates, starts a process or imports transformers: not in `make check`
further     a case of a test beside its first: not in `make check`
slow        a case that `sample` leaves out: not in `make test`

The others stand at the tests:

seconds     it takes more than one: not in `make check`
sample(…)   cases of one kind: `make test` takes the first n, or those whose names match these patterns, `make slow` the others
slow        it costs more than it is likely to find: not in `make test`, but in `make slow`
every       all types and GPUs of every family, real widths: python -m benchmarks.models runs them
benchmarks  a benchmark at a tiny size: `make benchmarks`
"""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from inspect import unwrap
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest

from suture.build import __main__ as build_main
from suture.build.process import build
from suture.core.network.parse import parse
from suture.export import __main__ as export_main
from suture.export import stage as export_stage
from suture.export.trace import trace
from suture.runtime.network_decoder import open_network
from suture.validate.stage import validate_pipeline

LONG = (  # what takes seconds to run
    subprocess, export_main, export_stage, export_stage.export, trace, build_main, build, validate_pipeline, parse, open_network,
)  # fmt: skip
HERE = str(Path(__file__).resolve().parent)


def mark(items: list[pytest.Item]) -> None:
    """Gives the marks `exports`, from what a test's code and its fixtures' mention, `further`, and `slow` where `sample` says so."""
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
    _sample(items)


def _sample(items: list[pytest.Item]) -> None:
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample") and not any(item.get_closest_marker(name) for name in ("slow", "every")):
            tests[item.nodeid.partition("[")[0]].append(item)
    for test, cases in tests.items():
        taken = cases[0].get_closest_marker("sample").args
        if taken and isinstance(taken[0], int):
            rest = cases[taken[0] :]
        else:
            rest = [case for case in cases if not any(fnmatchcase(case.callspec.id, pattern) for pattern in taken)]
        if len(rest) == len(cases) > 1:
            raise pytest.UsageError(f"{test}: none of its cases is in its sample {taken}")
        for case in rest if len(cases) > 1 else []:
            case.add_marker("slow")


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
    """What the function's names stand for: its module's, modules that it imports, and what modules of the tests have by that name."""
    names = set(_names(function.__code__))
    if "transformers" in {name.partition(".")[0] for name in names - function.__globals__.keys()}:
        return [trace]  # imported here alone: it takes as long
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    found += [sys.modules[name] for name in names - function.__globals__.keys() if name in sys.modules]
    modules = [each for each in found if isinstance(each, ModuleType) and _file(each).startswith(HERE)]
    return found + [vars(module)[name] for module in modules for name in names if name in vars(module)]


def _file(module: ModuleType | None) -> str:
    return getattr(module, "__file__", None) or ""


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
