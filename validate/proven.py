"""Levels 2 and 3 on small inputs, as float32 shadow copies and in the graphs' own type: as surgery has proven them, while the
files are still those, or proven here."""

import math
from pathlib import Path

import onnx

from suture.core.dtypes import HALVES
from suture.core.errors import UserError
from suture.core.identity import Contents, versions
from suture.core.manifest import hashes, read_manifest, result
from suture.core.proof import verdict as verdicts
from suture.core.proof.prove import prove
from suture.core.proof.subject import Subject
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
        source, portable, lowered = map(subject_of, (files.exported, files.portable, files.lowered))
        unquantised = subject_of(files.unquantised) if files.unquantised else None
    except UserError:
        return {}
    proof: Proof = prove(source, portable, lowered.model, unquantised, quantised=unquantised is not None)
    return {pair.level: pair for pair in proof.pairs}


def level_of(pair: PairVerdict) -> Level:
    """A verdict of surgery's as a level of the report: in the graphs' own type, with what the shadow copies say beside it."""
    last = pair.comparisons[-1]
    comparison = Comparison(*pair.title.split(" ↔ "), last.tolerance, _scenarios(last))
    return Level(pair.level, TITLES[pair.level], PASSED, comparison=comparison, notes=[TAKEN_OVER, *_notes(pair)])


def with_pair(level: Level, pair: PairVerdict | None) -> Level:
    """A level with what was found beside it: a difference in meaning that rounding would have hidden fails it."""
    if pair is not None and pair.status == DIFFERENT and level.status == PASSED:
        level.status, level.reason = DIFFERENT, pair.difference
    elif pair is not None and pair.status == PASSED:
        level.notes += _notes(pair)
    return level


def _scenarios(found: verdicts.DtypeComparison) -> list[ScenarioResult]:
    return [
        ScenarioResult(
            step.step,
            "small inputs",
            PASSED if step.worst <= found.tolerance else DIFFERENT,
            outputs=[OutputError(name, error if error is not None and math.isfinite(error) else None, 0,
                                 None if error is not None and math.isfinite(error) else "no number, or another shape")
                     for name, error in step.errors.items()],
        )
        for step in found.steps
    ]  # fmt: skip


def _notes(pair: PairVerdict) -> list[str]:
    exact = pair.comparisons[0]
    return [f"As float32 copies, on {len(exact.steps)} small inputs: {exact.worst:.1e} of {exact.tolerance:.0e}"]


def level_of_two(pair: PairVerdict) -> Level:
    """Of two graphs without caches."""
    comparison = None
    if pair.comparisons:
        last = pair.comparisons[-1]
        comparison = Comparison("reference", "candidate", last.tolerance, _scenarios(last))
    notes = _notes(pair) if pair.status == PASSED else []
    return Level(None, "Reference ↔ candidate", pair.status, pair.difference or pair.reason, comparison, notes=notes)


def refuse_other_inputs(first: Subject, second: Subject, reference: Path, candidate: Path, decoders: bool) -> None:
    """Raises UserError where one of two graphs has caches and the other none, or where, without caches, their inputs or outputs
    have other names."""
    if decoders:
        return
    for with_caches, where in ((first, reference), (second, candidate)):
        if with_caches.signature.caches:
            raise UserError(where, "has caches, and the other graph has none", "compare graphs of one kind")
    for kind in ("input", "output"):
        names = [_names(each.model.graph, kind) for each in (first, second)]
        if names[0] != names[1]:
            only = ", ".join(sorted(names[0] ^ names[1]))
            raise UserError(f"{reference}, {candidate}", f"only one has the {kind} {only}", "compare graphs of one interface")


def _names(graph: onnx.GraphProto, kind: str) -> set[str]:
    return {value.name for value in getattr(graph, kind)} - {tensor.name for tensor in graph.initializer}


def float_type(graph: onnx.ModelProto) -> int:
    """The onnx.TensorProto type that a graph computes in, as far as its inputs, outputs and weights say."""
    kinds = [value.type.tensor_type.elem_type for value in (*graph.graph.input, *graph.graph.output)]
    kinds += [tensor.data_type for tensor in graph.graph.initializer]
    return next((half for half in HALVES if half in kinds), onnx.TensorProto.FLOAT)


def subject_of(path: Path) -> Subject:
    """A graph in a file. Raises UserError where it is none."""
    graph = load_graph(path)
    return Subject(graph, find_signature(graph, path, need_caches=False), weights_root(path))
