"""Runs the phases of a plan and writes down what each pass did."""

import time
from collections.abc import Callable, Sequence

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, files
from suture.surgery.passes import Pass, Phase
from suture.surgery.plan import Plan
from suture.surgery.reports import cuda
from suture.surgery.reports.report import PassReport, PassVerdict, SurgeryReport

Verify = Callable[[str, Graph], PassVerdict | None]  # called with what each pass made; may raise to stop
MOST_ROUNDS = 8  # of a phase that is repeated: more than any graph known takes


def unverified(name: str, graph: Graph) -> PassVerdict | None:
    return None


def run_plan(graph: Graph, plan: Plan, verify: Verify = unverified) -> tuple[Graph, Graph, SurgeryReport]:
    """The portable and the lowered graph of `graph`, and the report. The graph passed in is used up."""
    report = SurgeryReport()
    portable = make_portable(graph, plan.portable, report, verify)
    return portable, lower(portable, plan.lowering, report, verify), report


def make_portable(
    graph: Graph, phases: Sequence[Phase], report: SurgeryReport, verify: Verify = unverified, quantise: Pass | None = None
) -> Graph:
    """The portable graph of `graph`, which is used up. `quantise` runs at the end; its result is not to be verified."""
    source = graph.signature
    report.count("before", graph)
    files.remove_unused(graph)
    verify("reading it at opset 24", graph)
    _run(graph, phases, report, verify)
    if quantise is not None:
        _run_pass(graph, quantise, report, unverified)
    report.count("portable", graph)
    report.list_unfused(graph, source)
    report.notes = [*graph.notes, *_left_inside(graph), *cuda.notes(graph)]
    return graph


def _left_inside(graph: Graph) -> list[str]:
    """The subgraphs that stay: passes do not look into them."""
    return [
        f"{node.op} {node.name} stays as it is, with {len(inner.nodes)} nodes inside"
        for node in graph.gs.nodes
        for inner in node.attrs.values()
        if isinstance(inner, gs.Graph)
    ]


def lower(
    portable: Graph, phases: Sequence[Phase], report: SurgeryReport, verify: Verify = unverified, form: str = "lowered"
) -> Graph:
    """What the passes make of a copy of the portable graph, counted in the report as `form`."""
    graph, before = files.reread(portable), len(report.passes)
    _run(graph, phases, report, verify)
    report.count(form, graph)
    report.notes += graph.notes + (report.not_lowered(graph, len(report.passes) - before) if form == "lowered" else [])
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


def _run(graph: Graph, phases: Sequence[Phase], report: SurgeryReport, verify: Verify) -> None:
    for phase in phases:
        for _ in range(MOST_ROUNDS if phase.repeated else 1):
            if not sum([_run_pass(graph, each, report, verify) for each in phase.passes]):
                break
        else:
            if phase.repeated:
                graph.notes.append(f"{phase.name} still change after {MOST_ROUNDS} rounds of their passes")


def _run_pass(graph: Graph, each: Pass, report: SurgeryReport, verify: Verify) -> int:
    started, nodes_before = time.monotonic(), len(graph.gs.nodes)
    matches = apply(graph, each)
    seconds = round(time.monotonic() - started, 4)
    nodes_after = len(graph.gs.nodes)
    verdict = verify(each.name, graph)
    report.passes.append(
        PassReport(each.name, each.formula, matches, nodes_before, nodes_after, seconds, graph.near_misses, verdict)
    )
    return matches
