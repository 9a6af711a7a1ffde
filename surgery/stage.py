"""Surgery as a stage: a model's file in; the portable and the lowered graph, a report and pictures in a folder out."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import onnx
from rich.console import Console

from suture.core.command import DONE, FOUND_DIFFERENCE
from suture.core.manifest import MANIFEST, read_manifest, remove_results, result
from suture.core.network.parse import shared_parser
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import FAILED, NOT_RUN, DifferenceFound, Proof
from suture.core.stage import Stage
from suture.core.tensors import references
from suture.core.weights import load_graph, weight_files, weights_root
from suture.surgery import own_passes
from suture.surgery.graph.weights import drop_unused, settle
from suture.surgery.operate import FLOAT, MODELS, Operated, operate, proven
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.quantize.options import read_request
from suture.surgery.verification import verify

REPORT = "report.json"
DIFFERENCE, LEFT = "difference", "surgery.difference"  # the folder of the graphs before and after a pass that changed more


def surgery(model: Path, out: Path, options: SurgeryOptions, force: bool = False) -> int:
    """Operates on the graph in file `model` and writes the results into `out`, unless they are there. Returns the exit
    status: that of a difference where `options.verify` finds one. Raises UserError for what surgery cannot read or do."""
    make_plan(options)  # what is wrong with the options is said before anything is read
    stage = Stage("surgery", out, _files_read(model, options), asdict(options), (*MODELS[:2], REPORT))
    if stage.up_to_date() and not force:
        status = _recorded(out)
        print(f"surgery: up to date{f', {status}' if status in (FAILED, NOT_RUN) else ''} ({out})")
        return FOUND_DIFFERENCE if status == FAILED else DONE
    if not options.no_verify:
        shared_parser().start()  # it loads TensorRT meanwhile
    try:
        with stage.writing() as partial:
            try:
                operated = operate(model, options, folder=partial)
            except verify.ChangedOutput as found:  # here, where the weights that passes added still are
                _leave(found, model, out)
                raise
            stage.extra["weights_root"] = _write(operated, model, partial, stage)
            try:
                proof = None if options.no_verify else _prove(operated, options, stage, partial)
            except DifferenceFound as found:
                _leave_written(found.proof, operated, model, stage, partial)
                raise
            _report(operated, partial)
    except (verify.ChangedOutput, DifferenceFound):
        return FOUND_DIFFERENCE
    remove_results(out / DIFFERENCE, LEFT)
    Console().print(operated.report.table())
    for line in operated.report.lines():
        print(line)
    nodes, said = operated.report.nodes, "not proven: --no-verify" if proof is None else proof.headline
    print(f"surgery: {nodes['before']} → {nodes['portable']} nodes (lowered {nodes['lowered']}) → {out}/model.onnx")
    print(f"surgery: {said}")
    return FOUND_DIFFERENCE if proof is not None and proof.status == FAILED else DONE


def _graph_files(model: Path) -> list[Path]:
    return [model, *weight_files(load_graph(model, types=False), weights_root(model))]


def _files_read(model: Path, options: SurgeryOptions) -> list[Path]:
    read = _graph_files(model)
    read += [file for argument in options.own for file in own_passes.files_read(Path(argument.partition("@")[0]))]
    request = read_request(options)
    if request and request.calibrated:
        from suture.surgery.quantize.calibration import files_read  # only here: torch takes 0.2 GB and seconds

        read += files_read(request, model)
    return read


def _write(operated: Operated, model: Path, partial: Path, stage: Stage) -> str:
    """Writes all results into `partial`, which becomes `out`. Returns the graphs' `weights_root`."""
    for name, drawn in operated.pictures.items():
        (partial / f"{name}.svg").write_text(drawn, encoding="utf-8")
    root = settle(operated.models, operated.root, model, partial, stage.out, operated.added)
    drop_unused(operated.models, partial, operated.added)
    for name, written in operated.files.items():
        onnx.save(written, partial / name)
    if (partial / FLOAT).is_dir():
        unquantised, folder = partial / FLOAT / "model.onnx", stage.out / FLOAT
        files = weight_files(onnx.load(unquantised, load_external_data=False), operated.root)
        manifest = {
            "weights_root": os.path.relpath(operated.root, folder),
            "outputs": {"model.onnx": unquantised.stat().st_size},
            "content": {os.path.relpath(file, folder): stage.contents.of(file) for file in files},
        }
        (partial / FLOAT / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return root


def _report(operated: Operated, partial: Path) -> None:
    (partial / "report.json").write_text(json.dumps(operated.report.as_json(), indent=2) + "\n", encoding="utf-8")


def _prove(operated: Operated, options: SurgeryOptions, stage: Stage, partial: Path) -> Proof:
    """Of the graphs as they were written into `partial`; the report and the manifest have it, with their hashes."""
    root = _root(stage, partial)
    unquantised = None
    if options.quantize or options.kv_cache != "none":
        path = partial / FLOAT / "model.onnx"
        kept = onnx.load(path, load_external_data=False) if path.is_file() else None
        unquantised = kept and Subject(kept, operated.signature, operated.root)
    proof = proven(operated, options, root, unquantised)
    hashes = {name: stage.contents.of(partial / name)["sha256"] for name in operated.files}
    stage.extra["proof"] = {"status": proof.status, "complete": proof.complete, "sha256": hashes}
    return proof


def _root(stage: Stage, partial: Path) -> Path:
    """The folder of the weights of what lies in `partial`, before it is moved."""
    root = stage.extra["weights_root"]
    return partial if root == "." else Path(os.path.normpath(stage.out / root))


def _recorded(out: Path) -> str | None:
    """What the last run's proof found."""
    recorded = (read_manifest(out) or {}).get("proof")
    return recorded.get("status") if isinstance(recorded, dict) else None


def _leave_written(proof: Proof, operated: Operated, model: Path, stage: Stage, partial: Path) -> None:
    """Puts the graphs that are not what they were made of on disk, where onnxruntime and compare can open them."""
    folder, root = stage.out / DIFFERENCE, _root(stage, partial)
    left = Stage(LEFT, folder, _graph_files(model), {"difference": proof.headline})
    with left.writing() as place:
        for name, written in operated.files.items():
            onnx.save(written, place / name)
        if root == partial:
            for file in {root / reference["location"] for each in operated.models for _, reference in references(each)}:
                (place / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place / file.relative_to(root))
        left.extra["weights_root"] = "." if root == partial else os.path.relpath(root, folder)
        _report(operated, place)
    print(f"surgery: {proof.headline}")
    print(f"surgery: the graphs are in {folder}: {', '.join(operated.files)}; made of {model}")
    if result(stage.out, "model.onnx"):
        print(f"surgery: {stage.out}/model.onnx is an earlier run's, which this one has left as it was")


def _leave(found: verify.ChangedOutput, model: Path, out: Path) -> None:
    """Puts the graphs before and after the difference on disk, where onnxruntime and validate can open them."""
    folder = out / DIFFERENCE
    stage = Stage(LEFT, folder, _graph_files(model), {"difference": str(found)})
    with stage.writing() as partial:
        stage.extra["weights_root"] = verify.save(found, model, partial, folder)
    print(f"surgery: {found}")
    print(f"surgery: both graphs are in {folder}: before.onnx, after.onnx")
    if result(out, "model.onnx"):
        print(f"surgery: {out}/model.onnx is an earlier run's, which this one has left as it was")
