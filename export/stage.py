"""Export as a stage: a checkpoint in, its graph with the KV cache as inputs and outputs in a folder out."""

from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from rich.console import Console

from suture.core.errors import UserError
from suture.core.stage import Stage, alone
from suture.export.options import Options
from suture.export.packed import write_packed
from suture.export.trace import trace, trace_encoder
from suture.export.weights import attach
from suture.models import meta_model, open_checkpoint, shipped
from suture.models.random_checkpoint import of_preset, presets

DECODER, ENCODER = "model.onnx", "encoder.onnx"


def export(out: Path, options: Options, force: bool = False) -> None:
    """Writes the checkpoint's graph, with its KV cache as inputs and outputs, into `out`, unless it is there. Raises UserError
    where it cannot be read or written."""
    folder = options.checkpoint or _named(options.model, out, options.dtype)
    checkpoint = open_checkpoint(folder)
    dtype = options.dtype or checkpoint.dtype
    stage = Stage(
        "export",
        out,
        inputs=checkpoint.files,
        options={"checkpoint": str(folder.resolve()), "dtype": dtype, "weights": options.weights},
    )
    if stage.up_to_date() and not force:
        print(f"export: up to date ({out})")
        return
    model = meta_model(checkpoint)
    with stage.writing() as partial:
        with Console().status(f"export: tracing {model.dimensions.layers} layers"):
            graphs = _trace(model, getattr(torch, dtype))
        packed = write_packed(graphs[DECODER], checkpoint, dtype, partial)
        weights = "copy" if packed else options.weights  # of what is not packed, which must lie beside the rest
        stage.extra |= attach(list(graphs.values()), checkpoint, dtype, weights, partial, out)
        stage.extra["bytes_copied"] += packed
        for name, graph in graphs.items():
            onnx.save(ir.to_proto(graph), partial / name)
        stage.extra["nodes"] = len(graphs[DECODER].graph)
    print(
        f"export: {stage.extra['nodes']} nodes, {dtype}, weights by {stage.extra['weights']} "
        f"({(stage.extra['bytes_referenced'] + stage.extra['bytes_copied']) / 1e6:.1f} MB) → {out}/{', '.join(graphs)}"
    )


def _named(name: str | None, out: Path, dtype: str | None) -> Path:
    """The folder of a checkpoint that comes with the project, or of one with the dimensions of a model that does not."""
    if name in shipped():
        return shipped()[name]
    if name not in presets():
        raise UserError(
            f"--model {name}", f"is none of {', '.join([*sorted(shipped()), *presets()])}", "or give --checkpoint DIR"
        )
    folder = out / "checkpoint"
    print(f"export: {name}: its weights do not come with the project, so random ones of its dimensions take their place in "
          f"{folder}; give the published ones with --checkpoint DIR", flush=True)  # fmt: skip
    with alone(folder):
        of_preset(name, folder, dtype or "bfloat16")
    return folder


def _trace(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, ir.Model]:
    """The graphs by the names of their files."""
    if model.dimensions.encoder_slots is None:
        return {DECODER: trace(model, dtype)}
    decoder, encoder = model.parts()
    return {DECODER: trace(decoder, dtype), ENCODER: trace_encoder(encoder, decoder, dtype)}
