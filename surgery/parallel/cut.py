"""The graphs of a pipeline's stages as files: stageS.onnx and stageS.trt.onnx of each stage S, and report.json. No weight moves."""

import json
from pathlib import Path

import onnx

from suture.core.command import DONE, FOUND_DIFFERENCE
from suture.core.errors import UserError
from suture.core.joined import join
from suture.core.manifest import read_manifest
from suture.core.network.parse import NoTensorRT, shared_parser
from suture.core.proof.prove import prove
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import DIFFERENT, FAILED, Proof
from suture.core.signature import Signature, find_signature
from suture.core.stage import Stage
from suture.core.weights import load_graph, place_weights, streamed_bytes, weight_files, weights_root
from suture.surgery.parallel.stages import cut_at_layers

FORMS = {"": "model.onnx", ".trt": "model.trt.onnx"}  # of a stage's file: which of surgery's it is cut from
REPORT = "report.json"


def make_stages(folder: Path, out: Path, stages: int, no_verify: bool = False, force: bool = False) -> int:
    """Cuts what surgery wrote into `folder` at layers, into `out`. Returns the exit status, that of a difference where the stages one
    after the other do not compute what the whole does. Raises UserError where it cannot be cut."""
    paths = [folder / name for name in FORMS.values()]
    wholes = [load_graph(path) for path in paths]
    root = weights_root(paths[0])
    names = [f"stage{stage}{form}.onnx" for form in FORMS for stage in range(stages)]
    read = [*paths, *weight_files(wholes[0], root)]
    stage = Stage("surgery.stages", out, read, {"stages": stages, "no_verify": no_verify}, [*names, REPORT])
    if stage.up_to_date() and not force:
        print(f"surgery.stages: up to date, {(read_manifest(out) or {}).get('proof')} ({out})")
        return DONE
    signature = find_signature(wholes[0], paths[0])
    if not signature.static:
        raise UserError(paths[0], "has a cache that grows", "run surgery without --cache growing first")
    portable = cut_at_layers(wholes[0], signature, stages)
    types = {value.name: value for part in portable for value in part.graph.input}
    parts = [portable, cut_at_layers(wholes[1], signature, stages, types)]
    proof = None if no_verify else _prove(wholes[0], parts, signature, root)
    said = proof.headline if proof is not None else "not proven: --no-verify"
    if proof is not None and proof.status in (DIFFERENT, FAILED):
        print(f"surgery.stages: {said}; nothing was written")
        return FOUND_DIFFERENCE
    crossing = [part.graph.output[0].name for part in parts[0][:-1]]
    with stage.writing() as partial:
        stage.extra |= {"weights_root": place_weights(wholes[0], paths[0], partial, out), "proof": said}
        for name, part in zip(names, [part for form in parts for part in form]):
            onnx.save(part, partial / name)
        report = {"stages": stages, "crossing": crossing, "proof": None if proof is None else proof.as_json()}
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    shares = " + ".join(f"{streamed_bytes(part) / max(streamed_bytes(wholes[0]), 1):.0%}" for part in parts[0])
    print(f"surgery.stages: cut at {', '.join(crossing)}; {shares} of the weights → {out}/stage0.trt.onnx ...")
    print(f"surgery.stages: {said}")
    return DONE


def _prove(whole: onnx.ModelProto, parts: list[list[onnx.ModelProto]], signature: Signature, root: Path) -> Proof:
    """The stages joined again against the whole, and their networks; each lowered stage is parsed by itself, too."""
    try:
        for number, part in enumerate(parts[1]):
            shared_parser().parse(Path(f"stage{number}.trt.onnx"), part, root)
    except NoTensorRT:
        pass  # the proof says so
    portable, lowered = (_joined(each) for each in parts)
    return prove(Subject(whole, signature, root), Subject(portable, signature, root), lowered)


def _joined(parts: list[onnx.ModelProto]) -> onnx.ModelProto:
    together = parts[0]
    for number, part in enumerate(parts[1:], 1):
        together = join(together, part, (f"stage {number - 1}", f"stage {number}")).model
    return together
