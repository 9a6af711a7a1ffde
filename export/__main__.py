"""python -m export --model NAME | --checkpoint DIR --out DIR [--dtype ...] [--weights copy|reference]"""

import argparse
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from rich.console import Console

from contracts.command import Parser, run
from contracts.manifest import Stage
from export.options import add_options
from export.packed import write_packed
from export.trace import trace
from export.weights import attach
from models import checkpoint_folder, meta_model, open_checkpoint


def main() -> None:
    parser = Parser(prog="export", description="Write a checkpoint as ONNX with its KV cache as inputs and outputs.")
    add_options(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    options = parser.parse_args()
    export(options)


def export(options: argparse.Namespace) -> None:
    folder = options.checkpoint or checkpoint_folder(options.model)
    checkpoint = open_checkpoint(folder)
    dtype = options.dtype or checkpoint.dtype
    files = sorted({entry.file for entry in checkpoint.tensors.values()})
    stage = Stage(
        "export",
        options.out,
        inputs=[folder / "config.json", *files],
        options={"checkpoint": str(folder.resolve()), "dtype": dtype, "weights": options.weights},
    )
    if stage.up_to_date() and not options.force:
        print(f"export: up to date ({options.out})")
        return
    model = meta_model(checkpoint)
    with stage.writing() as partial:
        with Console().status(f"export: tracing {model.dimensions.layers} layers"):
            graph = trace(model, getattr(torch, dtype))
        packed = write_packed(graph, checkpoint, dtype, partial)
        weights = "copy" if packed else options.weights  # of what is not packed, which must lie beside the rest
        stage.extra |= attach(graph, checkpoint, dtype, weights, partial, options.out)
        stage.extra["bytes_copied"] += packed
        onnx.save(ir.to_proto(graph), partial / "model.onnx")
        stage.extra["nodes"] = len(graph.graph)
    print(
        f"export: {len(graph.graph)} nodes, {dtype}, weights by {stage.extra['weights']} "
        f"({(stage.extra['bytes_referenced'] + stage.extra['bytes_copied']) / 1e6:.1f} MB) → {options.out}/model.onnx"
    )


if __name__ == "__main__":
    run("export", main)
