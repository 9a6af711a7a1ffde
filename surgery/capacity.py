"""python -m suture.surgery.capacity DIR|MODEL.onnx --capacity N --out DIR: a finished graph with another number of cache slots.

In a portable graph the capacity is written in the caches' shapes and nowhere else; the lowered graph is made from it anew.
"""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import onnx_graphsurgeon as gs

from suture.core import arguments
from suture.core.command import Parser, run
from suture.core.cpm_inputs import PLACED
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


def main(line: list[str] | None = None) -> None:
    parser = Parser(prog="surgery.capacity", description="Change how many slots a finished graph's KV cache has.")
    parser.add_argument("model", metavar="DIR|MODEL.onnx", type=Path, help="what surgery wrote, or its portable graph")
    parser.add_argument("--capacity", type=arguments.slots, required=True, help="slots of the static cache")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    change_capacity(parser.parse_args(line))


def change_capacity(options: Namespace) -> None:
    """Writes the portable and the lowered graph, with `options.capacity` slots, into options.out."""
    path = options.model / "model.onnx" if options.model.is_dir() else options.model
    made_with = (read_manifest(path.parent) or {}).get("options", {})
    kept = {name: made_with[name] for name in KEPT if name in made_with}
    source = load_graph(path)
    read = [path, *weight_files(source, weights_root(path)), *(Path(each.partition("@")[0]) for each in kept.get("own", []))]
    stage = Stage("surgery", options.out, read, {"capacity": options.capacity, **kept})
    if stage.up_to_date() and not options.force:
        print(f"surgery.capacity: up to date ({options.out})")
        return
    if any(node.op_type.startswith("TRT_") for node in source.graph.node):
        raise UserError(path, "is lowered", "give the portable graph: the lowered one is made from it")
    portable = files.read(path)
    before = portable.signature.capacity
    if before is None:
        raise UserError(path, "its cache grows, or it has none", "run surgery on it first")
    plan = make_plan(from_arguments({**kept, "capacity": options.capacity}))
    if known := known_positions(portable, options.capacity):
        limit, where = known
        raise UserError(f"--capacity {options.capacity}", f"{where} knows {limit:,} positions", "give at most that many")
    report = Report()
    report.count("before", portable)
    with stage.writing() as partial:
        resize(portable, options.capacity)
        report.count("portable", portable)
        forms = {"model.trt.onnx": lower(portable, plan.lowering, report)}
        if plan.ort_contrib:
            forms["model.ort.onnx"] = lower(portable, plan.ort_contrib, report, form="ort_contrib")
        stage.extra["weights_root"] = place_weights(source, path, partial, options.out)
        files.write(portable, partial / "model.onnx")
        for name, graph in forms.items():
            files.write(graph, partial / name)
        (partial / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    print(f"surgery.capacity: {before} → {options.capacity} slots → {options.out}/model.onnx")


def resize(graph: Graph, capacity: int) -> None:
    """Gives the graph caches of shape [batch, kv_heads, capacity, head_dim]."""
    ends = {tensor.name: tensor for tensor in [*graph.gs.inputs, *graph.gs.outputs]}
    for tensor in graph.gs.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.name not in ends:
            tensor.shape = None  # inferred anew
    for cache in graph.signature.caches:
        for name in (cache.past, cache.present):
            ends[name].shape = [*ends[name].shape[:2], capacity, ends[name].shape[3]]
    for name in filter(PLACED.__contains__, graph.signature.layout):
        ends[name].shape = [ends[name].shape[0], capacity]
    graph.signature = replace(graph.signature, capacity=capacity)
    files.refresh(graph)


if __name__ == "__main__":
    run("surgery.capacity", main)
