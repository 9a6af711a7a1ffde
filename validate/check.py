"""python -m validate --network MODEL.onnx [--reference PORTABLE.onnx] [--inputs FILE.npz] [--out DIR]"""

import json
from dataclasses import asdict
from pathlib import Path

import onnx
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.logger import G_LOGGER
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suture.core.command import FOUND_DIFFERENCE
from suture.core.errors import UserError
from suture.core.findings import Finding
from suture.core.network.audit import audit
from suture.core.network.compare import Outcome, compare, default_tolerance
from suture.core.network.evaluate import Evaluator
from suture.core.network.inputs import make_feeds, read_feeds
from suture.core.network.parse import parse
from suture.core.stage import Stage
from suture.core.weights import load_graph, weight_files, weights_root

console = Console()


def check_network(
    path: Path,
    reference: Path | None = None,
    inputs: Path | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> int:
    """Parses an ONNX file with TensorRT, audits the network, and compares it with onnxruntime on the same file, or on
    `reference`: a graph with the same inputs and outputs that onnxruntime can run where it cannot run this one.

    Prints findings, errors and the first ONNX node that differs; writes network.json and Polygraphy's run results into
    `out`. Returns the exit status: 1 where an output differs or the audit found an error.
    """
    graph = load_graph(path)
    stage = _stage(out, path, graph, reference, inputs, {"tolerance": tolerance, "seed": seed}) if out is not None else None
    _refuse_unrunnable(path, graph, reference)
    network = parse(path)
    findings = audit(network, graph)
    feeds = read_feeds(inputs) if inputs else make_feeds(graph, seed)
    allowed = tolerance or default_tolerance(network)
    outcomes = compare(Evaluator(network), reference or path, feeds, allowed)
    _show(f"{network.tensorrt}: {len(network.layers)} layers of {len(graph.graph.node)} ONNX nodes", findings)
    _show_outcomes(outcomes, allowed)
    if stage is not None:
        with stage.writing() as folder:
            _write(folder, network.tensorrt, findings, outcomes, allowed)
    wrong = any(finding.severity == "error" for finding in findings)
    differs = any(output.beyond(allowed) for outcome in outcomes for output in outcome.outputs)
    return FOUND_DIFFERENCE if wrong or differs else 0


def _stage(out: Path, path: Path, graph: onnx.ModelProto, reference: Path | None, inputs: Path | None, options: dict) -> Stage:
    read = [path, *weight_files(graph, weights_root(path)), *([inputs] if inputs else [])]
    if reference:
        read += [reference, *weight_files(load_graph(reference), weights_root(reference))]
    return Stage("validate.network", out, read, options)


def _refuse_unrunnable(path: Path, graph: onnx.ModelProto, reference: Path | None) -> None:
    own = next((node for node in graph.graph.node if node.op_type.startswith("TRT_")), None)
    if own is not None and reference is None:
        raise UserError(path, f"onnxruntime has no {own.op_type}", "give the graph that it was lowered from with --reference")


def _show(title: str, findings: list[Finding]) -> None:
    console.print(title, highlight=False)
    for finding in findings:
        color = "bold red" if finding.severity == "error" else "yellow"
        console.print(f"[{color}]{finding.severity}[/] {_plain(finding)}", highlight=False, soft_wrap=True)


def _show_outcomes(outcomes: list[Outcome], tolerance: float) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("inputs", "result", "worst output", "error", "tolerance"):
        table.add_column(heading, overflow="fold")
    for outcome in outcomes:
        worst = max(outcome.outputs, key=lambda output: (output.error is None, output.error or 0))
        verdict = "[bold red]different[/]" if worst.beyond(tolerance) else "[green]agrees[/]"
        error = worst.problem or f"{worst.error:.1e}"
        table.add_row(outcome.feeds, verdict, _plain(worst.tensor), _plain(error), f"{tolerance:.0e}")
    console.print(table)
    for outcome in outcomes:
        if (divergence := outcome.divergence) is not None:
            own = divergence.difference
            console.print(
                f"{outcome.feeds}: they diverge at {divergence.op} {_plain(divergence.node)}, tensor {_plain(own.tensor)} "
                f"({own.problem or f'{own.error:.1e}'})",
                highlight=False,
                soft_wrap=True,
            )


def _plain(text: object) -> str:
    return escape(str(text))


def _write(folder: Path, tensorrt: str, findings: list[Finding], outcomes: list[Outcome], tolerance: float) -> None:
    report = {
        "tensorrt": tensorrt,
        "tolerance": tolerance,
        "findings": [asdict(finding) for finding in findings],
        "inputs": [
            {
                "name": outcome.feeds,
                "outputs": [asdict(output) for output in outcome.outputs],
                "divergence": outcome.divergence and asdict(outcome.divergence),
            }
            for outcome in outcomes
        ],
    }
    (folder / "network.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for outcome in outcomes:
        results = RunResults()
        for side, values in outcome.values.items():
            results.append((side, [IterationResult(values, runner_name=side)]))
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            results.save(str(folder / f"network-{outcome.feeds.replace(' ', '-')}.polygraphy.json"))
