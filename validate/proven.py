"""Levels 2 and 3 on small inputs, as float32 shadow copies and in the graphs' own type: as surgery has proven them, while the
files are still those, or proven here."""

from pathlib import Path

from suture.core.errors import UserError
from suture.core.identity import Contents, versions
from suture.core.manifest import hashes, read_manifest, result
from suture.core.proof.prove import Subject, prove
from suture.core.proof.verdict import DIFFERENT, PASSED, PairVerdict, Proof, from_json
from suture.core.reader import read_json
from suture.core.signature import find_signature
from suture.core.weights import load_graph, weights_root
from suture.validate.compare import Comparison, OutputError, ScenarioResult
from suture.validate.level import TITLES, Level
from suture.validate.pipeline import PartFiles

TAKEN_OVER = "As surgery has proven it when it wrote the graphs, which are still the same (--force compares them again)"


def recorded(files: PartFiles) -> dict[int, PairVerdict]:
    """What surgery has proven of all of both graphs, by level; nothing where a file, a library or the code has changed since."""
    folder = files.part.folder / "surgery"
    manifest, path = read_manifest(folder), result(folder, "report.json")
    if manifest is None or path is None or manifest.get("versions") != versions("surgery"):
        return {}
    contents = Contents("validate")
    contents.learn(folder)
    try:
        proof = from_json(read_json(path).get("proof"))
        known = {(folder / name).resolve(): digest for name, digest in hashes(manifest).items()}
        if proof is None or not proof.complete or files.exported.resolve() not in known:
            return {}
        if any(contents.of(file)["sha256"] != digest for file, digest in known.items()):
            return {}
    except UserError:
        return {}
    return {pair.level: pair for pair in proof.pairs}


def compared_here(files: PartFiles) -> dict[int, PairVerdict]:
    """The same, proven now; nothing where a graph cannot be read, of which the level itself says so."""
    if files.portable is None or files.lowered is None:
        return {}
    try:
        source, portable, lowered = map(_subject, (files.exported, files.portable, files.lowered))
        unquantised = _subject(files.unquantised) if files.unquantised else None
    except UserError:
        return {}
    proof: Proof = prove(source, portable, lowered.model, unquantised, quantised=unquantised is not None)
    return {pair.level: pair for pair in proof.pairs}


def level_of(pair: PairVerdict) -> Level:
    """A verdict of surgery's as a level of the report: in the graphs' own type, with what the shadow copies say beside it."""
    last = pair.comparisons[-1]
    comparison = Comparison(*pair.title.split(" ↔ "), last.tolerance)
    for step in last.steps:
        outputs = [OutputError(name, error, 0) for name, error in step.errors.items()]
        comparison.scenarios.append(ScenarioResult(step.step, "small inputs", PASSED, outputs=outputs))
    return Level(pair.level, TITLES[pair.level], PASSED, comparison=comparison, notes=[TAKEN_OVER, *_notes(pair)])


def with_pair(level: Level, pair: PairVerdict | None) -> Level:
    """A level with what was found beside it: a difference in meaning that rounding would have hidden fails it."""
    if pair is not None and pair.status == DIFFERENT and level.status == PASSED:
        level.status, level.reason = DIFFERENT, pair.difference
    elif pair is not None and pair.status == PASSED:
        level.notes += _notes(pair)
    return level


def _notes(pair: PairVerdict) -> list[str]:
    exact = pair.comparisons[0]
    return [f"As float32 copies, on {len(exact.steps)} small inputs: {exact.worst:.1e} of {exact.tolerance:.0e}"]


def _subject(path: Path) -> Subject:
    graph = load_graph(path)
    return Subject(graph, find_signature(graph, path, need_caches=False), weights_root(path))
