"""Surgery as a stage: a model's file in; the portable and the lowered graph, a report and pictures in a folder out."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import onnx
from rich.console import Console

from suture.core.command import DONE, FOUND_DIFFERENCE
from suture.core.manifest import MANIFEST, remove_results, result
from suture.core.stage import Stage
from suture.core.weights import load_graph, weight_files, weights_root
from suture.surgery.graph.weights import drop_unused, settle
from suture.surgery.operate import FLOAT, Operated, operate
from suture.surgery.options import Options
from suture.surgery.plan import make_plan
from suture.surgery.quantize.options import read_request
from suture.surgery.verification import verify

MODELS = ("model.onnx", "model.trt.onnx", "model.ort.onnx")  # portable, lowered, and in onnxruntime's own operators
REPORT = "report.json"
DIFFERENCE, LEFT = "difference", "surgery.difference"  # the folder of the graphs before and after a pass that changed more


def surgery(model: Path, out: Path, options: Options, force: bool = False) -> int:
    """Operates on the graph in file `model` and writes the results into `out`, unless they are there. Returns the exit
    status: that of a difference where `options.verify` finds one. Raises UserError for what surgery cannot read or do."""
    make_plan(options)  # what is wrong with the options is said before anything is read
    stage = Stage("surgery", out, _files_read(model, options), asdict(options), (*MODELS[:2], REPORT))
    if stage.up_to_date() and not force:
        print(f"surgery: up to date ({out})")
        return DONE
    try:
        with stage.writing() as partial:
            try:
                operated = operate(model, options, folder=partial)
            except verify.ChangedOutput as found:  # here, where the weights that passes added still are
                _leave(found, model, out)
                raise
            stage.extra["weights_root"] = _write(operated, model, partial, out)
    except verify.ChangedOutput:
        return FOUND_DIFFERENCE
    remove_results(out / DIFFERENCE, LEFT)
    Console().print(operated.report.table())
    for line in operated.report.lines():
        print(line)
    nodes = operated.report.nodes
    print(f"surgery: {nodes['before']} → {nodes['portable']} nodes (lowered {nodes['lowered']}) → {out}/model.onnx")
    return DONE


def _files_read(model: Path, options: Options) -> list[Path]:
    read = [model, *weight_files(load_graph(model), weights_root(model))]
    read += [Path(argument.partition("@")[0]) for argument in options.own]
    request = read_request(options)
    if request and request.calibrated:
        from suture.surgery.quantize.calibration import files_read  # only here: torch takes 0.2 GB and seconds

        read += files_read(request, model)
    return read


def _write(operated: Operated, model: Path, partial: Path, out: Path) -> str:
    """Writes all results into `partial`, which becomes `out`. Returns the graphs' `weights_root`."""
    for name, drawn in operated.pictures.items():
        (partial / f"{name}.svg").write_text(drawn, encoding="utf-8")
    root = settle(operated.models, operated.root, model, partial, out, operated.added)
    drop_unused(operated.models, partial, operated.added)
    for name, written in zip(MODELS, operated.models):
        onnx.save(written, partial / name)
    if (partial / FLOAT).is_dir():
        size = (partial / FLOAT / "model.onnx").stat().st_size
        manifest = {"weights_root": os.path.relpath(operated.root, out / FLOAT), "outputs": {"model.onnx": size}}
        (partial / FLOAT / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (partial / REPORT).write_text(json.dumps(operated.report.as_json(), indent=2) + "\n", encoding="utf-8")
    return root


def _leave(found: verify.ChangedOutput, model: Path, out: Path) -> None:
    """Puts the graphs before and after the difference on disk, where onnxruntime and validate can open them."""
    folder = out / DIFFERENCE
    stage = Stage(LEFT, folder, [model], {"difference": str(found)})
    with stage.writing() as partial:
        stage.extra["weights_root"] = verify.save(found, model, partial, folder)
    print(f"surgery: {found}")
    print(f"surgery: both graphs are in {folder}: before.onnx, after.onnx")
    if result(out, "model.onnx"):
        print(f"surgery: {out}/model.onnx is an earlier run's, which this one has left as it was")
