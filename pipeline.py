"""python pipeline.py --model NAME | --checkpoint DIR --out DIR: export, surgery, build and validate, in order.

Each stage runs as its own process, exactly as `python -m STAGE` would, writes DIR/STAGE and is skipped while its results
hold. Options of the stages are taken here too and passed on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import build.options
import export.options
import surgery.options
import validate.options
from contracts.command import FOUND_DIFFERENCE, UNUSABLE_INPUT, Parser, end_with_parent, run
from contracts.manifest import read_manifest, result

ROOT = Path(__file__).resolve().parent
ENCODERS = {"surgery": "export/encoder.onnx", "build": "encoder/surgery/model.trt.onnx"}  # what stages read for an encoder
ENGINE_WEIGHTS = "--engine-weights"  # build's --weights, which here would be export's


@dataclass
class Outcome:
    stage: str  # as the table shows it
    status: int
    seconds: float
    result: str
    folder: Path  # of the stage's results


def main() -> int:
    parser = Parser(prog="pipeline", description="Take a checkpoint to a TensorRT engine, and check every step.")
    groups = {name: parser.add_argument_group(name) for name in ("export", "surgery", "build", "validate")}
    export.options.add_options(groups["export"])
    surgery.options.add_options(groups["surgery"])
    build.options.add_options(groups["build"], weights=ENGINE_WEIGHTS)
    validate.options.add_options(groups["validate"])
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where each stage gets its folder")
    parser.add_argument("--force", action="store_true", help="run every stage, even if its results are up to date")
    options = parser.parse_args()

    out = options.out
    inputs = {
        "export": [],
        "surgery": [str(out / "export" / "model.onnx")],
        "build": [str(out / "surgery" / "model.trt.onnx")],
        "validate": [str(out)],
    }
    outcomes: list[Outcome] = []
    for stage, group in groups.items():
        arguments = [*inputs[stage], *_given(group, options)]
        if stage != "validate":
            arguments += ["--out", str(out / stage)]
        outcomes.append(_run(stage, arguments + ["--force"] * options.force, out))
        if stage in ENCODERS and result(out / "export", "encoder.onnx") and outcomes[-1].status == 0:
            arguments = [str(out / ENCODERS[stage]), *_given(group, options), "--out", str(out / "encoder" / stage)]
            outcomes.append(_run(stage, arguments + ["--force"] * options.force, out / "encoder"))
            outcomes[-1].stage += " of the encoder"
        if outcomes[-1].status not in (0, FOUND_DIFFERENCE):
            break
    Console().print(_table(outcomes))
    return max((outcome.status for outcome in outcomes), default=0)


def _given(group: argparse._ArgumentGroup, options: argparse.Namespace) -> list[str]:
    """The options of a stage's group that differ from their defaults, as that stage's own command line takes them."""
    arguments = []
    for action in group._group_actions:
        value = getattr(options, action.dest)
        if value == action.default:
            continue
        flag = action.option_strings[-1].replace(ENGINE_WEIGHTS, "--weights")
        if isinstance(action, argparse._AppendAction):
            arguments += [part for each in value for part in (flag, str(each))]
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        else:
            arguments += [flag] if value is True else [flag, str(value)]
    return arguments


def _run(stage: str, arguments: list[str], out: Path) -> Outcome:
    started = time.monotonic()
    command = [sys.executable, "-P", "-m", stage, *arguments]
    status = subprocess.run(command, env=_environment(), preexec_fn=end_with_parent).returncode
    seconds = time.monotonic() - started
    if status < 0:
        print(
            f"pipeline: {stage} was killed by {signal.Signals(-status).name}; run the same command to carry on", file=sys.stderr
        )
        return Outcome(stage, UNUSABLE_INPUT, seconds, f"killed by {signal.Signals(-status).name}", out / stage)
    return Outcome(stage, status, seconds, _result(stage, status, out), out / stage)


def _environment() -> dict[str, str]:
    """The stages are packages beside this file, wherever the command is given."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def _result(stage: str, status: int, out: Path) -> str:
    if status == UNUSABLE_INPUT:
        return "stopped: see above"
    if status not in (0, FOUND_DIFFERENCE):
        return f"failed with status {status}"
    if stage == "export":
        return f"{read_manifest(out / stage)['nodes']} nodes"
    if stage == "surgery":
        report = json.loads((out / stage / "report.json").read_text())
        return f"{report['nodes']['before']} → {report['nodes']['portable']} nodes, {len(report['unfused'])} not fused"
    if stage == "build":
        engine = json.loads((out / stage / "engine.json").read_text())
        kernels = ", ".join(f"{profile['name']} {profile['kernels']} kernels" for profile in engine["profiles"])
        return f"{engine['engine_bytes'] / 1e6:.1f} MB, {kernels}"
    return f"{json.loads((out / stage / 'report.json').read_text())['verdict']} → {out / stage / 'report.html'}"


def _table(outcomes: list[Outcome]) -> Table:
    table = Table("stage", "seconds", "peak memory", "result")
    table.columns[1].justify = table.columns[2].justify = "right"
    for outcome in outcomes:
        manifest = read_manifest(outcome.folder) if outcome.status in (0, FOUND_DIFFERENCE) else None
        memory = f"{manifest['peak_memory_bytes'] / 1e6:,.0f} MB" if manifest else ""
        table.add_row(outcome.stage, f"{outcome.seconds:.1f}", memory, outcome.result)
    return table


if __name__ == "__main__":
    run("pipeline", main)
