"""The ranks' graphs as files: rankR.onnx and rankR.trt.onnx of each rank R, the joint graph, and report.json.

Weights that every rank has whole, and parts that lie in one piece, stay where they are; other parts are written to one file.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from suture.core.command import DONE, FOUND_DIFFERENCE
from suture.core.errors import UserError
from suture.core.layerwise import is_large
from suture.core.manifest import read_manifest
from suture.core.proof.excerpt import excerpt
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import DIFFERENT, FAILED, DifferenceFound, Proof
from suture.core.stage import Stage
from suture.core.tensors import references
from suture.core.weights import load_graph, streamed_bytes, weight_files, weights_root
from suture.surgery import own_passes
from suture.surgery.graph import Graph, files
from suture.surgery.graph.weights import new_file
from suture.surgery.options import from_arguments
from suture.surgery.parallel.division import Division, divide
from suture.surgery.parallel.joint_graph import joint_graph
from suture.surgery.parallel.pieces import Cuts
from suture.surgery.parallel.proof import prove_ranks
from suture.surgery.parallel.rank_graph import rank_graph
from suture.surgery.passes import Phase
from suture.surgery.plan import make_plan
from suture.surgery.reports.report import SurgeryReport
from suture.surgery.resize import made_with
from suture.surgery.runner import lower

JOINT, REPORT = "joint.onnx", "report.json"


def rank_name(rank: int) -> str:
    return f"rank{rank}.onnx"


def lowered_name(rank: int) -> str:
    return f"rank{rank}.trt.onnx"


@dataclass
class Ranks:
    """What a graph becomes for several GPUs. External weights are relative to `root`."""

    division: Division
    joint: onnx.ModelProto
    portable: list[onnx.ModelProto]
    lowered: list[onnx.ModelProto]
    root: Path

    @property
    def files(self) -> dict[str, onnx.ModelProto]:
        named = {JOINT: self.joint}
        for rank, (portable, lowered) in enumerate(zip(self.portable, self.lowered)):
            named |= {rank_name(rank): portable, lowered_name(rank): lowered}
        return named


def make_ranks(
    model: Path, out: Path, ranks: int, own: tuple[str, ...] = (), no_verify: bool = False, force: bool = False
) -> int:
    """Writes the graphs of `ranks` GPUs of `model`, a portable graph's file or surgery's folder, into `out`. Returns the exit
    status, that of a difference where the ranks do not compute what the graph does. Raises UserError for what does not divide."""
    path = model / "model.onnx" if model.is_dir() else model
    kept = made_with(path.parent, own)
    lowering = make_plan(from_arguments(kept)).lowering  # loads the passes of the user's, whose modules are read, too
    source = load_graph(path)
    code = [file for each in own for file in own_passes.files_read(Path(each.partition("@")[0]))]
    read = [path, *weight_files(source, weights_root(path)), *code]
    asked = {"tensor_parallel": ranks, "no_verify": no_verify, **kept}
    names = [JOINT, REPORT, *(name for rank in range(ranks) for name in (rank_name(rank), lowered_name(rank)))]
    stage = Stage("surgery.ranks", out, read, asked, names)
    if stage.up_to_date() and not force:
        print(f"surgery.ranks: up to date, {(read_manifest(out) or {}).get('proof')} ({out})")
        return DONE
    if any(node.op_type.startswith("TRT_") for node in source.graph.node):
        raise UserError(path, "is lowered", "give the portable graph: the ranks' lowered ones are made from theirs")
    whole = files.read(path)
    try:
        with stage.writing() as partial:
            made = divided(whole, ranks, lowering, new_file(partial, "ranks"), out)
            said = _write(whole, made, lowering, stage, partial, no_verify)
    except DifferenceFound as found:
        print(f"surgery.ranks: {found}; nothing was written")
        return FOUND_DIFFERENCE
    share = streamed_bytes(made.portable[0]) / max(streamed_bytes(source), 1)
    print(
        f"surgery.ranks: {'; '.join(made.division.notes())}; a rank reads {share:.0%} of the weights → {out}/{lowered_name(0)} ..."
    )
    print(f"surgery.ranks: {said}")
    return DONE


def _write(whole: Graph, made: Ranks, lowering: Sequence[Phase], stage: Stage, partial: Path, no_verify: bool) -> str:
    """Proves and writes all graphs into `partial`. Returns what the proof says; raises DifferenceFound."""
    proof = None if no_verify else _prove(whole, made, lowering)
    if proof is not None and proof.status in (DIFFERENT, FAILED):
        raise DifferenceFound(proof)
    said = proof.headline if proof is not None else "not proven: --no-verify"
    stage.extra |= {"weights_root": os.path.relpath(made.root, stage.out), "proof": said}
    for name, written in made.files.items():
        _move_references(written, made.root, partial, stage.out)
        onnx.save(written, partial / name)
    (partial / REPORT).write_text(json.dumps(_report(made, proof), indent=2) + "\n", encoding="utf-8")
    return said


def divided(whole: Graph, ranks: int, lowering: Sequence[Phase], file: Path | None = None, out: Path | None = None) -> Ranks:
    """The graph's ranks in memory. `file`: where their parts of weights are written; None: they stay in the models. `out`: a folder
    that is to lie below the root of all weights, too."""
    division = divide(whole, ranks)
    whole.weights_file = file
    cuts: Cuts = {}
    joint = joint_graph(whole, division, cuts)
    graphs = [rank_graph(whole, division, rank, cuts) for rank in range(ranks)]
    report = SurgeryReport()
    lowered = [lower(each, lowering, report) for each in graphs]
    models = [files.without_shapes(files.to_model(each)) for each in (joint, *graphs, *lowered)]
    added = frozenset().union(*(each.added for each in (joint, *graphs, *lowered)))
    roots = [os.path.abspath(whole.root), *([os.path.abspath(out)] if added and out is not None else [])]
    root = Path(os.path.commonpath(roots))
    for each in models:
        _refer_from(each, whole.root, root)
    return Ranks(division, models[0], models[1 : 1 + ranks], models[1 + ranks :], root)


def _refer_from(model: onnx.ModelProto, before: Path, root: Path) -> None:
    for tensor, reference in references(model):
        _relocate(tensor, os.path.relpath(os.path.abspath(before / reference["location"]), root))


def _move_references(model: onnx.ModelProto, root: Path, partial: Path, out: Path) -> None:
    """From the folder that is written to the one that it becomes."""
    here, there = (os.path.relpath(os.path.abspath(folder), root) for folder in (partial, out))
    for tensor, reference in references(model):
        folder, name = os.path.split(reference["location"])
        if folder == here:
            _relocate(tensor, os.path.normpath(os.path.join(there, name)))


def _relocate(tensor: onnx.TensorProto, location: str) -> None:
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location


def _prove(whole: Graph, made: Ranks, lowering: Sequence[Phase]) -> Proof:
    """Of a large graph by its first layers, divided as all of it was."""
    subject = Subject(files.without_shapes(files.to_model(whole)), whole.signature, whole.root)
    behind = None
    if is_large(subject.model) and (cut := excerpt({"whole": subject}, subject)) is not None:
        models, signatures, behind = cut
        subject = Subject(models["whole"], signatures["whole"], whole.root)
        few = files.of_model(_copy(subject.model), Path("excerpt"), whole.root)
        made = divided(few, made.division.ranks, lowering)
    joint = Subject(made.joint, subject.signature, made.root)
    proof = prove_ranks(subject, joint, [Subject(each, subject.signature, made.root) for each in made.lowered], made.division)
    for pair in proof.pairs:
        pair.left_out += [behind] if behind else []
    return proof


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _report(made: Ranks, proof: Proof | None) -> dict:
    """`placements`: of inputs and outputs, the divided axis and what of it each rank has."""
    division = made.division
    ends = {value.name for value in (*made.joint.graph.input, *made.joint.graph.output)}
    placements = {name: asdict(placement) for name, placement in division.placements.items() if name in ends}
    found = {"ranks": division.ranks, "sums": len(division.sums), "whole": division.whole, "placements": placements}
    return {**found, "proof": None if proof is None else proof.as_json()}
