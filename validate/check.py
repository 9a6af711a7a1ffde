"""suture check MODEL.onnx: what TensorRT makes of an ONNX file. `python -m validate --network` is the same."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from polygraphy.comparator import IterationResult, RunResults
from polygraphy.logger import G_LOGGER
from rich.console import Console

from suture.core.command import FOUND_DIFFERENCE, UNUSABLE_INPUT
from suture.core.errors import UserError
from suture.core.findings import Finding
from suture.core.junit import write_junit
from suture.core.named import check_results, write_text
from suture.core.network.check import AGREES, CheckResult, check
from suture.core.network.compare import FeedsOutcome
from suture.core.network.record import differences, read_record, save_record
from suture.core.network.reports import as_json, junit_cases
from suture.core.shapes import parse_shapes
from suture.core.stage import Stage
from suture.core.weights import load_graph, weight_files, weights_root
from suture.validate.check_command import add_options
from suture.validate.options import STDOUT

NETWORK = "network.json"
SHOWN = 20  # outputs, the worst first
console = Console()


def run_check(options: argparse.Namespace) -> int:
    """Checks, prints and writes as the options say. Returns the exit status."""
    json = None if options.json == STDOUT else options.json
    check_results({"--json": json, "--junit": options.junit, "--save": options.save}, _read_by(options), options.out)
    stage = _stage(options) if options.out is not None else None
    before = read_record(options.against) if options.against else None
    result = check(
        options.model,
        shapes=parse_shapes(options.shape),
        inputs=options.inputs,
        reference=options.reference,
        tolerance=options.tolerance,
        seed=options.seed,
        plugins=options.plugin,
    )
    against = None if before is None or result.network is None else differences(before, result)
    if options.json == STDOUT:
        sys.stdout.write(as_json(result, against))
    else:
        _show(result, against, before and before["tensorrt"])
    if json is not None:
        write_text(json, as_json(result, against))
    if options.junit:
        write_junit(f"suture check {result.model.name}", junit_cases(result, against), options.junit)
    if options.save and result.network is not None:
        save_record(result, options.save)
    if stage is not None and result.network is not None:
        with stage.writing() as folder:
            _write(folder, result)
    if result.refusals:
        _say_refused(result)
        return UNUSABLE_INPUT
    return result.status or (FOUND_DIFFERENCE if against else 0)


def _stage(options: argparse.Namespace) -> Stage:
    """What writes into --out; made before the work, as it says what cannot be written there."""
    chosen = {"tolerance": options.tolerance, "seed": options.seed, "shape": options.shape}
    return Stage("validate.network", options.out, list(filter(None, _read_by(options))), chosen, [NETWORK])


def _read_by(options: argparse.Namespace) -> Iterator[Path | None]:
    """All files that are read for this; of a graph that cannot be, the check itself says so."""
    yield from (options.model, options.reference, options.inputs, options.against, *options.plugin)
    for path in filter(None, (options.model, options.reference)):
        with suppress(UserError):
            yield from weight_files(load_graph(path, types=False), weights_root(path))


def check_network(
    path: Path,
    reference: Path | None = None,
    inputs: Path | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> int:
    """`run_check` with these options. Returns the exit status."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    given = dict(reference=reference, inputs=inputs, tolerance=tolerance, seed=seed, out=out)
    options = parser.parse_args([str(path)])
    vars(options).update(given)
    return run_check(options)


def _show(result: CheckResult, against: list[str] | None, other: str | None) -> None:
    if result.network is not None:
        layers, nodes = len(result.network.layers), result.nodes
        read = f"{result.tensorrt}: {layers} layer{'s' * (layers != 1)} of {nodes} ONNX node{'s' * (nodes != 1)}"
        console.print(read, highlight=False, markup=False)
    color = {"refused": "bold red", "dropped": "bold red", "misread": "bold red", "differs": "bold red", "agrees": "green"}
    rows = [*_rows(result), *(("against", f"{other}: {line}") for line in against or [])]
    if against == []:
        rows.append(("against", f"{other}: the same network and outputs"))
    width = max(len(kind) for kind, _ in rows)
    for kind, text in rows:
        console.print(f"{kind:<{width}}", style=color.get(kind, "yellow"), end="  ", highlight=False, markup=False)
        console.print(text.replace("\n", " "), highlight=False, markup=False, soft_wrap=True)
    style = "green" if result.verdict == AGREES and not against else "bold"
    console.print(_verdict(result, against), style=style, markup=False, highlight=False, soft_wrap=True)


def _rows(result: CheckResult) -> Iterator[tuple[str, str]]:
    for repair in result.repairs:
        yield "repaired", repair
    for refusal in result.refusals:
        yield "refused", str(refusal)
    if not result.all_read:
        yield "refused", "what lies behind these was not read: there may be more"
    for finding in result.findings:
        yield _kind(finding), str(finding)
    if result.attentions:
        fused = sum(attention.fused for attention in result.attentions)
        yield "attention", f"{fused} of {len(result.attentions)} in one fused kernel"
        for attention in result.attentions:
            if not attention.fused:
                yield "attention", f"{attention.where}: not fused, {attention.why}"
    for outcome in result.outcomes:
        yield from _outcome(outcome, result.tolerance)
    if result.not_compared:
        yield "differs" if result.failed else "not compared", result.not_compared


def _kind(finding: Finding) -> str:
    kind = finding.kind
    return kind if finding.severity == "error" or kind == "dropped" else "slow" if kind == "attention" else kind or "note"


def _outcome(outcome: FeedsOutcome, tolerance: float) -> Iterator[tuple[str, str]]:
    if outcome.problem:
        yield "not run", f"{outcome.feeds}: {outcome.problem}"
    worst = sorted(outcome.outputs, key=lambda output: (output.error is not None, -(output.error or 0)))
    for output in worst[:SHOWN]:
        error = output.problem or f"{output.error:.1e} of the largest value"
        verdict = "differs" if output.beyond(tolerance) else "agrees"
        yield verdict, f"{outcome.feeds}: {output.tensor} {error} (allowed {tolerance:.0e})"
    if len(worst) > SHOWN:
        yield "differs" if worst[SHOWN].beyond(tolerance) else "agrees", f"{outcome.feeds}: {len(worst) - SHOWN} more outputs"
    if (divergence := outcome.divergence) is not None:
        own = divergence.difference
        text = (
            f"first divergence at {divergence.op} {divergence.node}, tensor {own.tensor} ({own.problem or f'{own.error:.1e}'})"
        )
        yield "differs", f"{outcome.feeds}: {text}"


def _verdict(result: CheckResult, against: list[str] | None) -> str:
    why = f" ({result.not_compared})" if result.not_compared else ""
    changed = f"; {len(against)} differences from what was saved" if against else ""
    return f"check: {result.model}: {result.verdict}{why}{changed}"


def _say_refused(result: CheckResult) -> None:
    first, more = str(result.refusals[0]), len(result.refusals) - 1
    behind = f" (and {more} more)" if more else ""
    print(f"check: {result.model}: {first}{behind}".replace("\n", " "), file=sys.stderr)


def _write(folder: Path, result: CheckResult) -> None:
    (folder / NETWORK).write_text(as_json(result), encoding="utf-8")
    for outcome in result.outcomes:
        results = RunResults()
        for side, values in outcome.values.items():
            results.append((side, [IterationResult(values, runner_name=side)]))
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            results.save(str(folder / f"network-{outcome.feeds.replace(' ', '-')}.polygraphy.json"))
