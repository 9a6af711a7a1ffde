"""suture run --model NAME | --checkpoint DIR --out DIR: export, surgery, build and validate, in order.

Each stage runs as its own process, exactly as `python -m STAGE` would, writes DIR/STAGE and is skipped while its results
hold. Of a model of several parts each part goes through surgery and build in turn, in DIR/PART/STAGE. Options of the stages
are taken here too and passed on. The first stage that does not end with 0 is the last that runs, and its exit status is the
pipeline's.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from suture.build import options as build_options
from suture.core import child
from suture.core.command import (
    DONE,
    FAULT,
    FOUND_DIFFERENCE,
    INTERRUPTED,
    UNUSABLE_INPUT,
    CommandParser,
    end_with_parent,
    given,
    run,
)
from suture.core.manifest import read_manifest
from suture.core.parts import find_parts
from suture.export import options as export_options
from suture.surgery import options as surgery_options
from suture.validate import options as validate_options

PATIENCE = 10  # seconds that a stage has to end itself after Ctrl-C
READS = {"surgery": "export/model.onnx", "build": "surgery/model.trt.onnx"}  # of a part's folder
ENGINE_WEIGHTS = "--engine-weights"  # build's --weights, which here would be export's
STOPPED = {  # what the table says of a stage that did not do its work
    FOUND_DIFFERENCE: "found a difference: see above",
    UNUSABLE_INPUT: "stopped: see above",
    FAULT: "a fault of this program: see above",
    INTERRUPTED: "interrupted",
}


@dataclass
class StageOutcome:
    stage: str  # as the table shows it
    status: int
    seconds: float
    result: str
    memory: int | None = None  # bytes at its peak, where it finished


def main(arguments: list[str] | None = None, prog: str = "pipeline") -> int:
    parser = CommandParser(prog=prog, description="Take a checkpoint to a TensorRT engine, and check every step.")
    groups = {name: parser.add_argument_group(name) for name in ("export", "surgery", "build", "validate")}
    export_options.add_options(groups["export"])
    surgery_options.add_options(groups["surgery"])
    build_options.add_options(groups["build"], weights=ENGINE_WEIGHTS)
    validate_options.add_options(groups["validate"])
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where each stage gets its folder")
    parser.add_argument("--force", action="store_true", help="run every stage, even if its results are up to date")
    options = parser.parse_args(arguments)
    surgery_options.refuse_without_effect(parser, options)
    if options.cache == "static" and given(options, "max_past"):
        parser.error("--max-past is a growing cache's; leave it out, or add --cache growing")

    outcomes: list[StageOutcome] = []
    for outcome in _stages(groups, options):
        outcomes.append(outcome)
        if outcome.status != DONE:
            break
    _show(outcomes)
    return outcomes[-1].status


def _stages(groups: dict[str, argparse._ArgumentGroup], options: argparse.Namespace) -> Iterator[StageOutcome]:
    """Runs one stage of one part after another."""
    out, given_to = options.out, {stage: _given(group, options) for stage, group in groups.items()}
    given_to = {stage: arguments + ["--force"] * options.force for stage, arguments in given_to.items()}
    yield _run("export", [*given_to["export"], "--pipeline", "--out", str(out)], out)
    parts = find_parts(out)
    for stage, reads in READS.items():
        for part in parts:
            arguments = [str(part.folder / reads), *given_to[stage], "--out", str(part.folder / stage)]
            outcome = _run(stage, arguments, part.folder)
            outcome.stage += f" of {part.name}" * (len(parts) > 1)
            yield outcome
    yield _run("validate", [str(out), *given_to["validate"]], out)


def _given(group: argparse._ArgumentGroup, options: argparse.Namespace) -> list[str]:
    """The options of a stage's group that differ from their defaults, as that stage's own command line takes them."""
    arguments = []
    for action in group._group_actions:
        value = getattr(options, action.dest)
        if value == action.default:
            continue
        flag = action.option_strings[-1].replace(ENGINE_WEIGHTS, "--weights")
        if isinstance(action, argparse._AppendAction):
            arguments += [f"{flag}={each}" for each in value]
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        else:
            arguments += [flag] if value is True else [f"{flag}={value}"]
    return arguments


def _run(stage: str, arguments: list[str], out: Path) -> StageOutcome:
    started = time.monotonic()
    command = child.command("suture.core.command", f"suture.{stage}", *arguments)
    status = _wait(subprocess.Popen(command, env=child.environment(), preexec_fn=end_with_parent))
    seconds = time.monotonic() - started
    if status < 0:
        name = signal.Signals(-status).name
        why = ", as the system does when memory is short" if name == "SIGKILL" else ""
        print(f"pipeline: {stage} was killed by {name}{why}; run the same command to carry on", file=sys.stderr)
        return StageOutcome(stage, FAULT, seconds, f"killed by {name}")
    finished = status == DONE or (status == FOUND_DIFFERENCE and stage == "validate")
    if not finished:
        compares = stage == "surgery" and "--no-verify" not in arguments
        if status not in STOPPED or (status == FOUND_DIFFERENCE and not compares):  # by itself, Python ends with 1
            status = FAULT
        return StageOutcome(stage, status, seconds, STOPPED[status])
    try:
        out = find_parts(out)[0].folder if stage == "export" else out
        manifest = _manifest(out / stage)
        if status == FOUND_DIFFERENCE and manifest["verdict"] not in ("different", "failed"):  # an earlier run's
            return StageOutcome(stage, FAULT, seconds, STOPPED[FAULT])
        return StageOutcome(stage, status, seconds, _result(stage, out), manifest["peak_memory_bytes"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"pipeline: {out / stage}: its results cannot be read ({error}); run with --force", file=sys.stderr)
        return StageOutcome(stage, UNUSABLE_INPUT, seconds, "results that cannot be read")


def _wait(running: subprocess.Popen) -> int:
    """The stage's exit status. Ctrl-C reaches it, too: it is given the time to clear up."""
    try:
        return running.wait()
    except BaseException:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(PATIENCE)
        raise
    finally:
        running.kill()


def _result(stage: str, out: Path) -> str:
    """What a stage that has just ended says it found."""
    if stage == "export":
        return f"{_manifest(out / stage)['nodes']} nodes"
    if stage == "surgery":
        report = _read(out / stage / "report.json")
        return f"{report['nodes']['before']} → {report['nodes']['portable']} nodes, {len(report['unfused'])} not fused"
    if stage == "build":
        engine = _read(out / stage / "engine.json")
        kernels = ", ".join(f"{profile['name']} {profile['kernels']} kernels" for profile in engine["profiles"])
        return f"{engine['engine_bytes'] / 1e6:.1f} MB, {kernels}"
    return f"{_read(out / stage / 'report.json')['verdict']} → {out / stage / 'report.html'}"


def _manifest(folder: Path) -> dict:
    """Raises LookupError where there is none."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise LookupError("no manifest")
    return manifest


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _show(outcomes: list[StageOutcome]) -> None:
    from rich.console import Console  # here, so that a broken install is one line, too
    from rich.markup import escape
    from rich.table import Table

    table = Table("stage", "seconds", "peak memory", "result")
    table.columns[1].justify = table.columns[2].justify = "right"
    for outcome in outcomes:
        memory = f"{outcome.memory / 1e6:,.0f} MB" if outcome.memory else ""
        table.add_row(outcome.stage, f"{outcome.seconds:.1f}", memory, escape(outcome.result))
    Console().print(table)


if __name__ == "__main__":
    run("pipeline", main)
