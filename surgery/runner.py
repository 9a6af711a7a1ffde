"""Runs passes in order and writes down what each did."""

import time
from collections.abc import Callable

from surgery import files
from surgery.graph import Graph, NearMiss
from surgery.lowering import LOWERING
from surgery.passes import PORTABLE, interface, last_token_logits, node_names, static_cache
from surgery.report import PassReport, Report

Run = Callable[[Graph], int]


def operate(graph: Graph, cache: str, capacity: int, logits: str, skip: list[str]) -> tuple[Graph, Graph, Report]:
    """The portable and the lowered graph of `graph`, and the report. The graph passed in is used up."""
    report = Report()
    report.count("before", graph)
    plan: list[tuple[str, Run, str]] = [(name_of(a_pass), a_pass.run, a_pass.__doc__) for a_pass in PORTABLE]
    if cache == "static":
        plan.append(("static_cache", lambda graph: static_cache.run(graph, capacity), static_cache.__doc__))
    if logits == "last":
        plan.append(("last_token_logits", last_token_logits.run, last_token_logits.__doc__))
    plan += [(name_of(a_pass), a_pass.run, a_pass.__doc__) for a_pass in (interface, node_names)]
    for name, run, formula in plan:
        if name not in skip:
            graph = _run_pass(graph, name, run, formula, report)
    report.count("portable", graph)
    report.list_unfused(graph)

    lowered = files.reread(graph)
    for a_pass in LOWERING:
        if name_of(a_pass) not in skip:
            lowered = _run_pass(lowered, name_of(a_pass), a_pass.run, a_pass.__doc__, report)
    report.count("lowered", lowered)
    return graph, lowered, report


def name_of(a_pass: object) -> str:
    return a_pass.__name__.rsplit(".", 1)[-1]


def _run_pass(graph: Graph, name: str, run: Run, formula: str, report: Report) -> Graph:
    """Runs one pass, removes the nodes that nothing uses any more, and infers shapes anew where something changed."""
    started = time.monotonic()
    nodes_before = len(graph.gs.nodes)
    graph.near_misses = []
    matches = run(graph)
    misses: list[NearMiss] = graph.near_misses
    graph.gs.cleanup()
    if matches:
        graph = files.reread(graph)
    formula = formula.split("\n", 1)[0]
    seconds = round(time.monotonic() - started, 4)
    report.passes.append(PassReport(name, formula, matches, nodes_before, len(graph.gs.nodes), seconds, misses))
    return graph
