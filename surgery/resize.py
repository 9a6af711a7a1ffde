"""A finished graph with another number of cache slots.

In a portable graph the capacity is written in the caches' shapes and nowhere else; the lowered graph is made from it anew.
"""

import json
from dataclasses import replace
from pathlib import Path

import onnx_graphsurgeon as gs

from suture.core.errors import UserError
from suture.core.manifest import MANIFEST, recorded_option
from suture.core.stage import Stage
from suture.core.weights import load_graph, place_weights, weight_files, weights_root
from suture.surgery import own_passes
from suture.surgery.graph import Graph, files
from suture.surgery.masks.position_ids import known_positions
from suture.surgery.options import from_arguments
from suture.surgery.plan import make_plan
from suture.surgery.reports.report import SurgeryReport
from suture.surgery.runner import lower

WRITTEN = ("model.onnx", "model.trt.onnx", "report.json")


def change_capacity(model: Path, out: Path, capacity: int, own: tuple[str, ...] = (), force: bool = False) -> None:
    """Writes the portable and the lowered graph of `model`, a file or surgery's folder, with `capacity` slots into `out`.
    `own`: the passes of the user's that it was made with, FILE.py or FILE.py@PASS."""
    path = model / "model.onnx" if model.is_dir() else model
    kept = made_with(path.parent, own)
    plan = make_plan(from_arguments({**kept, "capacity": capacity}))  # before its passes' files are listed: it loads them
    source = load_graph(path)
    read = [
        path,
        *weight_files(source, weights_root(path)),
        *(file for each in own for file in own_passes.files_read(Path(each.partition("@")[0]))),
    ]
    stage = Stage("surgery", out, read, {"capacity": capacity, **kept}, WRITTEN)
    if stage.up_to_date() and not force:
        print(f"surgery.capacity: up to date ({out})")
        return
    if any(node.op_type.startswith("TRT_") for node in source.graph.node):
        raise UserError(path, "is lowered", "give the portable graph: the lowered one is made from it")
    portable = files.read(path)
    before = portable.signature.capacity
    if before is None:
        raise UserError(path, "its cache grows, or it has none", "run surgery on it first")
    if known := known_positions(portable, capacity):
        limit, where = known
        raise UserError(f"--capacity {capacity}", f"{where} knows {limit:,} positions", "give at most that many")
    report = SurgeryReport()
    report.count("before", portable)
    with stage.writing() as partial:
        resize(portable, capacity)
        report.count("portable", portable)
        forms = {"model.trt.onnx": lower(portable, plan.lowering, report)}
        if plan.ort_contrib:
            forms["model.ort.onnx"] = lower(portable, plan.ort_contrib, report, form="ort_contrib")
        stage.extra["weights_root"] = place_weights(source, path, partial, out)
        files.write(portable, partial / "model.onnx")
        for name, graph in forms.items():
            files.write(graph, partial / name)
        (partial / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    print(f"surgery.capacity: {before} → {capacity} slots → {out}/model.onnx")


def made_with(folder: Path, own: tuple[str, ...]) -> dict:
    """Options that the graph was made with. Passes of the user's are code: they are run where the command line names them, and
    not because a file does."""
    if recorded_option(folder, "once", list):
        raise UserError(folder / MANIFEST, "it was made with --once", "run surgery with the other --capacity")
    recorded = recorded_option(folder, "own", list) or []
    if sorted(map(str, recorded)) != sorted(own):
        named = " ".join(f"--pass {each}" for each in recorded)
        remedy = f"give {named}, if they are yours" if recorded else "leave --pass out"
        raise UserError(folder / MANIFEST, f"it was made with {len(recorded)} passes of your own", remedy)
    skip = [each for each in recorded_option(folder, "skip", list) or [] if isinstance(each, str)]
    attention = recorded_option(folder, "attention")
    kept = {"skip": skip, "own": list(own), "onnxruntime": recorded_option(folder, "onnxruntime", bool) or False}
    return kept | ({"attention": attention} if attention in ("mask", "lengths") else {})


def resize(graph: Graph, capacity: int) -> None:
    """Gives the graph caches of shape [batch, kv_heads, capacity, head_dim]."""
    ends = {tensor.name: tensor for tensor in [*graph.gs.inputs, *graph.gs.outputs]}
    for tensor in graph.gs.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.name not in ends:
            tensor.shape = None  # inferred anew
    for cache in graph.signature.caches:
        for name in (cache.past, cache.present):
            ends[name].shape = [*ends[name].shape[:2], capacity, ends[name].shape[3]]
    for name in graph.signature.placed:
        ends[name].shape = [ends[name].shape[0], capacity]
    graph.signature = replace(graph.signature, capacity=capacity)
    files.refresh(graph)
