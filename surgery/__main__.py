"""python -m surgery MODEL.onnx --out DIR [--cache static|growing] [--capacity 2048] [--logits all|last] [--verify] ..."""

import argparse
import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from rich.console import Console

from suture.core.command import FOUND_DIFFERENCE, Parser, run
from suture.core.manifest import MANIFEST, remove_results, result
from suture.core.stage import Stage
from suture.core.tensors import references
from suture.core.weights import load_graph, weight_files, weights_root
from suture.surgery.graph import Graph, files
from suture.surgery.graph.branches import take
from suture.surgery.graph.weights import drop_unused, new_file, settle
from suture.surgery.options import add_options, refuse_without_effect
from suture.surgery.quantize import options as quantising
from suture.surgery.reports import picture
from suture.surgery.runner import Pass, lower, make_plan, operate
from suture.surgery.verification import loads, verify
from suture.surgery.verification.steps import NO_ALPHAS

OPTIONS = ("cache", "capacity", "logits", "merge", "attention", "onnxruntime", "skip", "own", "verify", "bisect", "past", "named", "branch",
           *quantising.OPTIONS)  # fmt: skip
MODELS = ("model.onnx", "model.trt.onnx", "model.ort.onnx")  # portable, lowered, and in onnxruntime's own operators
DIFFERENCE, LEFT = "difference", "surgery.difference"  # the folder of the graphs before and after a pass that changed more
FLOAT = "float"  # the folder, beside a quantised graph, of the same graph before it was quantised

PICTURED = 1  # the second layer: the first one also has what all layers share


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="surgery", description="Fuse a language model's graph and make its KV cache static.")
    parser.add_argument("model", metavar="MODEL.onnx", type=Path)
    add_options(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    options = parser.parse_args(arguments)
    refuse_without_effect(parser, options)
    return surgery(options)


@contextmanager
def collection_paused() -> Iterator[None]:
    """A graph is one large cycle of nodes and tensors: the collector would walk all of it, over and over, for nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@collection_paused()
def surgery(options: argparse.Namespace) -> int:
    """Writes the portable and the lowered graph into options.out. Returns the exit status."""
    plan = make_plan(
        options.cache, options.capacity, options.logits, options.skip, options.own, options.merge, options.attention,
        options.onnxruntime,
        # whose small weights TensorRT else writes out in bfloat16, at every step, to join them
        joined=onnx.TensorProto.BFLOAT16 if options.quantize == "int8" else None,
    )  # fmt: skip
    request = quantising.read_request(options)
    source = load_graph(options.model)
    read = [options.model, *weight_files(source, weights_root(options.model))]
    read += [Path(argument.partition("@")[0]) for argument in options.own]
    if request and request.calibrated:
        from suture.surgery.quantize.calibration import files_read  # only here: torch takes 0.2 GB and seconds

        read += files_read(request, options.model)
    stage = Stage("surgery", options.out, read, {name: getattr(options, name) for name in OPTIONS})
    if stage.up_to_date() and not options.force:
        print(f"surgery: up to date ({options.out})")
        return 0
    graph = files.read(options.model, options.past, dict(each.split("=", 1) for each in options.named), options.branch)
    if options.branch is not None:  # what the rest is compared with
        take(source, options.model, options.branch)
    pictures = {"before.svg": picture.draw_layer(graph, PICTURED, f"Layer {PICTURED} before surgery")}
    verifier = verify.Verifier(source, graph.signature, graph.root) if options.verify or options.bisect else None
    try:
        with stage.writing() as partial:
            graph.weights_file = new_file(partial)

            def quantising_pass(graph: Graph) -> Pass | None:
                if request is None:
                    return None
                from suture.surgery.quantize.calibration import read_windows  # only here: torch takes 0.2 GB and seconds
                from suture.surgery.quantize.run import quantise

                _keep_float(graph, partial, options.out)
                graph.weights_file = new_file(partial, "quantised")
                windows = read_windows(request, options.model, graph.signature.capacity) if request.calibrated else None

                def quantise_and_restart(graph: Graph) -> int:
                    matches = quantise(graph, request, windows)
                    if verifier:
                        verifier.restart(graph)
                    return matches

                return Pass("quantise", str(request), quantise_and_restart)

            try:
                checks = [verifier] if verifier else []
                portable, lowered, report = operate(graph, plan, *checks, quantise=quantising_pass)
                graphs = [portable, lowered]
                if options.onnxruntime:  # its tables are those of rows that dynamic NTK leaves alone
                    made = files.to_model(portable)
                    checks = (
                        [verify.Verifier(made, portable.signature, portable.root, NO_ALPHAS, portable.added)]
                        if verifier
                        else []
                    )
                    graphs.append(lower(portable, plan.ort_contrib, report, *checks, form="ort_contrib"))
                added = set().union(*(each.added for each in graphs))
            except verify.ChangedOutput as found:  # here, where the weights that passes added still are
                _leave(found if not options.bisect else verify.narrow(found, plan, partial), options)
                raise
            pictures["after.svg"] = picture.draw_layer(portable, PICTURED, f"Layer {PICTURED} after surgery")
            for name in [name for name in pictures if all(pictures.values())]:
                (partial / name).write_text(pictures[name], encoding="utf-8")
            models = [files.without_shapes(files.to_model(each)) for each in graphs]
            stage.extra["weights_root"] = settle(models, graph.root, options.model, partial, options.out, added)
            drop_unused(models, partial, added)
            loads.check(models[0], source, options.model)
            for name, model in zip(MODELS, models):
                onnx.save(model, partial / name)
            (partial / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    except verify.ChangedOutput:
        return FOUND_DIFFERENCE
    remove_results(options.out / DIFFERENCE, LEFT)
    Console().print(report.table())
    for line in report.lines():
        print(line)
    nodes = report.nodes
    print(f"surgery: {nodes['before']} → {nodes['portable']} nodes (lowered {nodes['lowered']}) → {options.out}/model.onnx")
    return 0


def _keep_float(graph: Graph, partial: Path, out: Path) -> None:
    """Writes the portable graph as it is before it is quantised, over the source's weights: what the exported graph can
    be compared with. Not where passes have made weights of their own, which are not kept."""
    model = files.without_shapes(files.to_model(graph))
    if any(reference["location"] in graph.added for _, reference in references(model)):
        return
    folder = partial / FLOAT
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    size = (folder / "model.onnx").stat().st_size
    manifest = {"weights_root": os.path.relpath(graph.root, out / FLOAT), "outputs": {"model.onnx": size}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _leave(found: verify.ChangedOutput, options: argparse.Namespace) -> None:
    """Puts the graphs before and after the difference on disk, where onnxruntime and validate can open them."""
    folder = options.out / DIFFERENCE
    stage = Stage(LEFT, folder, [options.model], {"difference": str(found)})
    with stage.writing() as partial:
        stage.extra["weights_root"] = verify.save(found, options.model, partial, folder)
    print(f"surgery: {found}")
    print(f"surgery: both graphs are in {folder}: before.onnx, after.onnx")
    if result(options.out, "model.onnx"):
        print(f"surgery: {options.out}/model.onnx is an earlier run's, which this one has left as it was")


if __name__ == "__main__":
    run("surgery", main)
