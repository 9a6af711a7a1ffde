"""Golden outputs of a user's own model: what its exported graphs compute now, to hold later ones against.

DIR/golden.json            versions, seed, tolerance; of each part its type, and of each output its shape and largest value
DIR/PART.polygraphy.json   samples of each output at each step, as Polygraphy's RunResults

The inputs follow from the seed: steps of a decoder, drawn values for other parts.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.logger import G_LOGGER
from pydantic import Field

from suture.core.arrays import from_base64
from suture.core.errors import UserError
from suture.core.manifest import recorded_file
from suture.core.network.inputs import Feeds
from suture.core.proof.cases import make_cases
from suture.core.proof.steps import LAST, Step, Steps, Unrunnable
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import DIFFERENT, FAILED, NOT_RUN, PASSED
from suture.core.reader import parse_json, read_bytes
from suture.core.refusals import BrokenFile, refusals
from suture.core.signature import LOGITS
from suture.core.stage import Stage
from suture.core.tolerances import REWRITTEN, scale
from suture.core.typed import Strict, read_typed
from suture.validate.compare import Comparison, OutputError, ScenarioResult
from suture.validate.level import Level
from suture.validate.pipeline import PartFiles, Pipeline
from suture.validate.proven import float_type, subject_of

GOLDEN, FORMAT, SAMPLES, RUNNER = "golden.json", 1, 4096, "golden"
LIMIT = 1 << 30  # bytes of a part's samples
REMEDY = "write them with --save-golden"
Outputs = dict[str, np.ndarray]


class Output(Strict):
    shape: list[Annotated[int, Field(ge=0)]]
    largest: Annotated[float, Field(ge=0)]


class Saved(Strict):
    name: str
    outputs: Annotated[dict[str, Output], Field(min_length=1)]


class GoldenPart(Strict):
    tolerance: Annotated[float, Field(ge=1e-12, le=1)]
    steps: Annotated[list[Saved], Field(min_length=1)]


class Golden(Strict):
    """golden.json, as far as it is read."""

    format: Literal[1]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    parts: dict[str, GoldenPart]


def save(pipeline: Pipeline, folder: Path, tolerance: float | None, seed: int, force: bool) -> int:
    """Writes what each part's exported graph computes into `folder`; returns how many steps. Raises UserError where golden outputs
    lie there already, unless `force`, or where a graph takes none of the inputs."""
    names = [GOLDEN, *(_name(files) for files in pipeline.parts)]
    options = {"seed": seed, "tolerance": tolerance}
    stage = Stage("validate.golden", folder, [files.exported for files in pipeline.parts], options, names, "--save-golden")
    if (folder / GOLDEN).exists() and not force:
        raise UserError(folder / GOLDEN, "is there already", "name another folder, or replace it with --force")
    about = {"format": FORMAT, "versions": stage.identity["versions"], "seed": seed, "parts": {}}
    steps = 0
    with stage.writing() as partial, G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        for files in pipeline.parts:
            subject = subject_of(files.exported)
            found = _computed(subject, subject, seed, files.exported)
            if not found:
                raise UserError(
                    files.exported, "takes none of the inputs that are drawn for it", "compare it by suture compare"
                )
            sampled = {step: {name: _sampled(value) for name, value in outputs.items()} for step, outputs in found.items()}
            _run_results(sampled).save(str(partial / _name(files)))
            steps += len(found)
            about["parts"][files.part.name] = {
                "tolerance": tolerance or REWRITTEN[float_type(subject.model)],
                "steps": [
                    {"name": step, "outputs": {name: _described(value) for name, value in outputs.items()}}
                    for step, outputs in found.items()
                ],
            }
        (partial / GOLDEN).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return steps


def check(pipeline: Pipeline, folder: Path, tolerance: float | None) -> list[Level]:
    """The exported and the portable graph of each part against the golden outputs in `folder`. Raises UserError where there are
    none, or those of other parts."""
    about = _read(folder)
    names = [files.part.name for files in pipeline.parts]
    if sorted(names) != sorted(about["parts"]):
        raise UserError(
            folder, f"is of the parts {', '.join(about['parts'])}, not {', '.join(names)}", "name those of this model"
        )
    levels = []
    for files in pipeline.parts:
        part, several = about["parts"][files.part.name], f"{files.part.name}: " if len(names) > 1 else ""
        golden = _load(folder / _name(files), part)
        for name, path in (("exported", files.exported), ("portable", files.unquantised or files.portable)):
            title = f"{several}Golden ↔ {name} graph"
            levels.append(_level(title, files, path, part, golden, tolerance, about["seed"]))
    return levels


def _name(files: PartFiles) -> str:
    return f"{files.part.name}.polygraphy.json"


def _level(
    title: str, files: PartFiles, path: Path | None, part: dict, golden: dict, tolerance: float | None, seed: int
) -> Level:
    if path is None:
        return Level(None, title, NOT_RUN, "surgery has written no portable graph")
    allowed = tolerance or part["tolerance"]
    comparison = Comparison("golden", "graph", allowed)
    try:
        found = _computed(subject_of(files.exported), subject_of(path), seed, path)
    except UserError as error:
        return Level(None, title, FAILED, str(error))
    for described in part["steps"]:
        step = described["name"]
        result = ScenarioResult(step, "as it was saved", PASSED)
        comparison.scenarios.append(result)
        if step not in found:
            result.status, result.reason = NOT_RUN, "the graph does not take it"
            continue
        for name, expected in described["outputs"].items():
            if name == LOGITS and name not in found[step] and LAST in found[step]:
                continue  # only the last tokens' are left, and they are compared
            result.outputs.append(_error(name, expected, golden[step][name], found[step].get(name)))
        if result.exceeding(allowed):
            result.status = DIFFERENT
    return Level(None, title, comparison.status, comparison=comparison)


def _error(name: str, described: dict, expected: np.ndarray, found: np.ndarray | None) -> OutputError:
    if found is None:
        return OutputError(name, None, 0, "missing")
    if list(found.shape) != described["shape"]:
        return OutputError(name, None, 0, f"shape {list(found.shape)} instead of {described['shape']}")
    distance = np.abs(_sampled(found).astype(np.float64) - expected)
    error = float(distance.max(initial=0.0)) / scale(described["largest"], _described(found)["largest"])
    return OutputError(name, error, 0) if np.isfinite(error) else OutputError(name, None, 0, "not a number")


def _computed(source: Subject, subject: Subject, seed: int, path: Path) -> dict[str, Outputs]:
    """By step, what counts of the outputs. Uneven rows of a growing cache are taken one by one. `path`: the subject's graph."""
    try:
        runner = subject.runner(False, seed=seed)
    except Unrunnable as error:
        raise UserError(path, str(error), "export it again") from None
    cases = make_cases(source.model, source.signature, subject.model, subject.signature, seed)
    found = {}
    for case in cases:
        try:
            found[case.name] = _outputs(runner, case)
        except Unrunnable:
            continue
    return found


def _outputs(runner: Steps, case: Step | Feeds) -> Outputs:
    if isinstance(case, Feeds) or case.even or runner.capacity is not None or not all(map(runner.fits, case.rows)):
        return runner.read(case)
    rows = [runner.read(row) for row in case.rows]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _described(value: np.ndarray) -> dict:
    finite = np.abs(value.astype(np.float64)[np.isfinite(value.astype(np.float64))])
    return {"shape": list(value.shape), "largest": float(finite.max(initial=0.0))}


def _sampled(value: np.ndarray) -> np.ndarray:
    """float32 [at most SAMPLES], evenly spaced, the last among them."""
    flat = np.asarray(value, np.float32).reshape(-1)
    return flat[np.unique(np.linspace(len(flat) - 1, 0, min(SAMPLES, len(flat))).astype(int))] if len(flat) else flat


def _run_results(sampled: dict[str, Outputs]) -> RunResults:
    results = RunResults()
    results.append((RUNNER, [IterationResult(outputs, runner_name=RUNNER) for outputs in sampled.values()]))
    return results


def _read(folder: Path) -> dict:
    return read_typed(recorded_file(folder, GOLDEN) or folder / GOLDEN, Golden, REMEDY)


def _load(path: Path, part: dict) -> dict[str, Outputs]:
    """By step. Raises UserError where the file has not what golden.json says of it."""
    saved = parse_json(read_bytes(path, LIMIT, REMEDY), path)
    with refusals(path, "has no golden outputs", REMEDY):
        ((_, iterations),) = saved["lst"]
        values = [
            {name: from_base64(value["values"]["array"]) for name, value in each["outputs"].items()} for each in iterations
        ]
        found = {step["name"]: outputs for step, outputs in zip(part["steps"], values, strict=True)}
        for step in part["steps"]:
            sizes = {name: min(SAMPLES, math.prod(output["shape"])) for name, output in step["outputs"].items()}
            if sizes != {name: value.size for name, value in found[step["name"]].items()} or len(found) < len(values):
                raise BrokenFile("has the outputs of something else")
    return found
