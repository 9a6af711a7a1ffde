"""Runs passes in order and writes down what each did."""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from suture.core.errors import UserError
from suture.surgery.graph import Graph, files
from suture.surgery.passes.import_contrib import IMPORT_CONTRIB
from suture.surgery.passes.lowering import LOWERING, attention_mask, neighbouring_weights
from suture.surgery.passes.ort_contrib import ORT_CONTRIB
from suture.surgery.passes.portable import (
    PORTABLE,
    duplicates,
    interface,
    last_token_logits,
    merged_weights,
    node_names,
    packed_heads,
    static_cache,
)
from suture.surgery.reports.report import PassReport, Report, Verdict


@dataclass(frozen=True)
class Pass:
    name: str
    formula: str
    run: Callable[[Graph], int]


@dataclass(frozen=True)
class Plan:
    """The passes that write the portable graph, and those that lower it from there: for TensorRT, and for onnxruntime."""

    portable: tuple[Pass, ...]
    lowering: tuple[Pass, ...]
    ort_contrib: tuple[Pass, ...] = ()


def make_plan(
    cache: str,
    capacity: int,
    logits: str,
    skip: Sequence[str] = (),
    own: Sequence[str] = (),
    merge: Sequence[str] = (),
    attention: str = "mask",
    onnxruntime: bool = False,
    joined: int | None = None,
) -> Plan:
    """The plan for these options of the command line. `own`: FILE.py[@PASS], which runs after PASS, or after all passes
    that leave the interface alone. `joined`: of this ONNX type, gate and up that follow one another in a file become one
    product in the portable graph, too. Raises UserError for a pass that does not exist, or a file that is none."""
    static = _pass(static_cache, partial(static_cache.run, capacity=capacity))
    last, merged = _pass(last_token_logits), _pass(merged_weights, partial(merged_weights.run, kinds=tuple(merge)))
    joining = _pass(neighbouring_weights, partial(neighbouring_weights.run, only=joined))
    merging = [*[merged, _pass(packed_heads)] * bool(merge), *[joining] * (joined is not None)]
    ends = [_pass(duplicates), *merging, _pass(interface), _pass(node_names)]
    fusing, forms = (
        [_pass(module) for module in (*IMPORT_CONTRIB, *PORTABLE)],
        {attention_mask: {"lengths": attention == "lengths"}},
    )
    lowering = [_pass(module, partial(module.run, **forms.get(module, {}))) for module in LOWERING]
    own_operators = [_pass(module) for module in ORT_CONTRIB] if onnxruntime else []
    names = {each.name for each in (*fusing, static, last, merged, *ends, *lowering, *own_operators)}
    for name in skip:
        if name not in names:
            raise UserError(f"--skip {name}", "no such pass", f"choose from {', '.join(sorted(names))}")
    portable = [*fusing, *[static] * (cache == "static"), *[last] * (logits == "last"), *ends]
    for argument in own:
        path, _, after = argument.partition("@")
        after = after or fusing[-1].name
        passes = next((each for each in (portable, lowering, own_operators) if any(a.name == after for a in each)), None)
        if passes is None:
            raise UserError(f"--pass {argument}", f"no pass {after} runs", f"choose from {', '.join(sorted(names))}")
        place = max(index for index, each in enumerate(passes) if each.name == after)
        passes.insert(place + 1, load_pass(Path(path)))
    keep = [tuple(each for each in passes if each.name not in skip) for passes in (portable, lowering, own_operators)]
    return Plan(*keep)


def load_pass(path: Path) -> Pass:
    """A user's own pass: a Python file with a docstring and `run(graph: suture.surgery.graph.Graph) -> int`."""
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"--pass {path}", "no such Python file", "name a file with run(graph) -> int in it")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"--pass {path}", f"does not load ({type(error).__name__}: {error})", "mend it") from error
    if not module.__doc__ or not callable(getattr(module, "run", None)):
        raise UserError(f"--pass {path}", "has no docstring or no run(graph) -> int", "add both")
    return _pass(module)


def operate(
    graph: Graph,
    plan: Plan,
    verify: Callable[[str, Graph], Verdict | None] = lambda name, graph: None,
    quantise: Callable[[Graph], Pass | None] = lambda graph: None,
) -> tuple[Graph, Graph, Report]:
    """The portable and the lowered graph of `graph`, and the report. The graph passed in is used up.

    `verify(name, graph)` is called with what each pass made, and may raise to stop. `quantise(graph)` is called with the
    finished portable graph, and returns the pass that quantises it, if any: the one whose result is not to be verified.
    """
    report, source = Report(), graph.signature
    report.count("before", graph)
    files.remove_unused(graph)
    verify("reading it at opset 24", graph)
    for each in plan.portable:
        _run(graph, each, report, verify)
    if (quantising := quantise(graph)) is not None:
        _run(graph, quantising, report, lambda name, graph: None)
    report.count("portable", graph)
    report.list_unfused(graph, source)
    report.notes = graph.notes
    return graph, lower(graph, plan.lowering, report, verify), report


def lower(
    portable: Graph,
    passes: Sequence[Pass],
    report: Report,
    verify: Callable[[str, Graph], Verdict | None] = lambda name, graph: None,
    form: str = "lowered",
) -> Graph:
    """What the passes make of a copy of the portable graph, counted in the report as `form`."""
    graph = files.reread(portable)
    for each in passes:
        _run(graph, each, report, verify)
    report.count(form, graph)
    report.notes += graph.notes + (report.not_lowered(graph, len(passes)) if form == "lowered" else [])
    return graph


def apply(graph: Graph, each: Pass) -> int:
    """Runs one pass, removes the nodes that nothing uses any more, and infers shapes anew where something changed.

    Returns how often the pass matched; where, and where nearly, is in graph.matched and graph.near_misses."""
    graph.near_misses, graph.matched, nodes_before = [], [], len(graph.gs.nodes)
    try:
        matches = each.run(graph)
    except Exception as error:
        error.add_note(f"in the pass {each.name}")
        raise
    if matches or len(graph.gs.nodes) != nodes_before:  # a near miss may leave some behind
        files.remove_unused(graph)
    if matches:
        files.refresh(graph)
    return matches


def _run(graph: Graph, each: Pass, report: Report, verify: Callable[[str, Graph], Verdict | None]) -> None:
    started, nodes_before = time.monotonic(), len(graph.gs.nodes)
    matches = apply(graph, each)
    seconds = round(time.monotonic() - started, 4)
    nodes_after = len(graph.gs.nodes)
    verdict = verify(each.name, graph)
    report.passes.append(
        PassReport(each.name, each.formula, matches, nodes_before, nodes_after, seconds, graph.near_misses, verdict)
    )


def _pass(module: ModuleType, run: Callable[[Graph], int] | None = None) -> Pass:
    return Pass(module.__name__.rsplit(".", 1)[-1], module.__doc__.strip().split("\n", 1)[0], run or module.run)
