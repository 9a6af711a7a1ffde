"""A finished graph with another number of cache slots.

In a portable graph the capacity is written in the caches' shapes and nowhere else; the lowered graph is made from it anew.
"""

import json
from dataclasses import replace
from pathlib import Path

import onnx_graphsurgeon as gs

from suture.core.errors import UserError
from suture.core.manifest import read_manifest
from suture.core.stage import Stage
from suture.core.weights import load_graph, place_weights, weight_files, weights_root
from suture.surgery.graph import Graph, files
from suture.surgery.masks.position_ids import known_positions
from suture.surgery.options import from_arguments
from suture.surgery.plan import make_plan
from suture.surgery.reports.report import Report
from suture.surgery.runner import lower

KEPT = ("skip", "own", "attention", "onnxruntime")  # of the options that the graph was made with


def change_capacity(model: Path, capacity: int, out: Path, force: bool = False) -> None:
    """Writes the portable and the lowered graph of `model`, a portable graph or its folder, with `capacity` slots into `out`."""
    path = model / "model.onnx" if model.is_dir() else model
    made_with = (read_manifest(path.parent) or {}).get("options", {})
    kept = {name: made_with[name] for name in KEPT if name in made_with}
    source = load_graph(path)
    read = [path, *weight_files(source, weights_root(path)), *(Path(each.partition("@")[0]) for each in kept.get("own", []))]
    stage = Stage("surgery", out, read, {"capacity": capacity, **kept})
    if stage.up_to_date() and not force:
        print(f"surgery.capacity: up to date ({out})")
        return
    if any(node.op_type.startswith("TRT_") for node in source.graph.node):
        raise UserError(path, "is lowered", "give the portable graph: the lowered one is made from it")
    portable = files.read(path)
    before = portable.signature.capacity
    if before is None:
        raise UserError(path, "its cache grows, or it has none", "run surgery on it first")
    plan = make_plan(from_arguments({**kept, "capacity": capacity}))
    if known := known_positions(portable, capacity):
        limit, where = known
        raise UserError(f"--capacity {capacity}", f"{where} knows {limit:,} positions", "give at most that many")
    report = Report()
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
