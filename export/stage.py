"""Export as a stage: a checkpoint in, the graph of each of its parts in a folder out."""

import json
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from rich.console import Console

from suture.core.errors import UserError
from suture.core.manifest import is_below, read_manifest, recorded_option, remove_results
from suture.core.parts import DECODER, PARTS, STAGE
from suture.core.stage import Stage, alone
from suture.export.description import description
from suture.export.embeddings import take_embeddings
from suture.export.options import ExportOptions
from suture.export.packed import write_packed
from suture.export.trace import trace, trace_graph
from suture.export.weights import attach
from suture.models.architectures import meta_model, open_checkpoint
from suture.models.checkpoint import Checkpoint
from suture.models.hub import folder_of
from suture.models.named import presets, shipped
from suture.models.parts import Part, part_named, parts_of, table_of
from suture.models.random_weights import of_preset
from suture.models.tokenizer import VOCABULARY, tokenizer_files
from suture.models.tokenizer_json import has_tiktoken, write_library_files

GRAPH = "model.onnx"


def export(out: Path, options: ExportOptions, force: bool = False, pipeline: bool = False) -> None:
    """Writes the checkpoint's graph into `out`, or, of a model of several parts, each part's into `out`/PART/export and
    parts.json into `out`, unless they are there. `pipeline`: a single part goes to `out`/export. Raises UserError where
    something cannot be read or written."""
    folder = folder_of(options.checkpoint) if options.checkpoint else _named(options.model, out, options.dtype)
    checkpoint = open_checkpoint(folder, options.lora)
    model = meta_model(checkpoint)
    if options.picture is not None:
        from suture.models.image_text import set_picture_size  # here: transformers' models take seconds to import

        set_picture_size(model, options.picture, "--picture-size {}x{}".format(*options.picture))
    parts = parts_of(model)
    if options.part is None and len(parts) > 1:
        _export_all(out, parts, checkpoint, options, force)
        return
    part = parts[0] if options.part is None else part_named(model, options.part)
    out = out / "export" if pipeline else out
    _export(part, _stage(part, checkpoint, out, options), checkpoint, options, force)
    if out.name == "export":
        remove_results(out.parent, STAGE)  # of an earlier model of several parts


def _export_all(out: Path, parts: tuple[Part, ...], checkpoint: Checkpoint, options: ExportOptions, force: bool) -> None:
    """Each part, and last of all parts.json: while parts are written there is none, so that nobody takes some of one model
    and some of another."""
    names = [part.name for part in parts]
    index = Stage(STAGE, out, [checkpoint.described[0]], {**_asked(checkpoint, options), "parts": names}, [PARTS])
    listed = recorded_option(out, "parts", list) or []
    stages = [_stage(part, checkpoint, out / part.name / "export", options) for part in parts]
    if force or not all(stage.up_to_date() for stage in (index, *stages)):
        remove_results(out, STAGE)
    for part, stage in zip(parts, stages):
        _export(part, stage, checkpoint, options, force)
    if index.up_to_date():
        return
    with index.writing() as partial:
        listed_now = [read_manifest(stage.out)["part"] for stage in stages]
        (partial / PARTS).write_text(json.dumps({"parts": listed_now}, indent=1) + "\n", encoding="utf-8")
    for name in filter(is_below, set(map(str, listed)) - set(names)):  # of an earlier model
        remove_results(out / name / "export", "export")


def _export(part: Part, stage: Stage, checkpoint: Checkpoint, options: ExportOptions, force: bool) -> None:
    out, dtype = stage.out, stage.identity["options"]["dtype"]
    if stage.up_to_date() and not force:
        print(f"export: up to date ({out})")
        return
    with stage.writing() as partial:
        with Console().status(f"export: tracing the {part.name}"):
            of_type = getattr(torch, dtype)
            graph = trace(part.module, of_type) if part.kind == DECODER else trace_graph(part, of_type)
        if part.takes_embeddings:
            take_embeddings(graph, f"{table_of(part.module)[0]}.weight")
        packed = write_packed(graph, checkpoint, dtype, partial)
        weights = "copy" if packed else options.weights  # of what is not packed, which must lie beside the rest
        stage.extra |= attach(graph, checkpoint, dtype, weights, partial, out)
        stage.extra["bytes_copied"] += packed
        onnx.save(ir.to_proto(graph), partial / GRAPH)
        if part.kind == DECODER and has_tiktoken(checkpoint.folder):
            write_library_files(checkpoint.folder, partial)  # which servers read
        stage.extra |= {"nodes": len(graph.graph), "part": description(part, graph)}
    for name in stage.extra["not_finite"]:
        print(f"export: {name} has NaN or infinite values, and so will what is computed with it")
    print(
        f"export: {stage.extra['nodes']} nodes, {dtype}, weights by {stage.extra['weights']} "
        f"({(stage.extra['bytes_referenced'] + stage.extra['bytes_copied']) / 1e6:.1f} MB) → {out}/{GRAPH}"
    )


def _stage(part: Part, checkpoint: Checkpoint, out: Path, options: ExportOptions) -> Stage:
    vocabulary = [path for path in tokenizer_files(checkpoint.folder) if path.name == VOCABULARY and part.kind == DECODER]
    return Stage("export", out, [*checkpoint.files, *vocabulary], {**_asked(checkpoint, options), "part": part.name}, [GRAPH])


def _asked(checkpoint: Checkpoint, options: ExportOptions) -> dict:
    dtype = options.dtype or checkpoint.dtype
    asked = {"checkpoint": str(checkpoint.folder.resolve()), "dtype": dtype, "weights": options.weights}
    asked |= {"lora": str(options.lora.resolve())} if options.lora else {}
    return asked if options.picture is None else {**asked, "picture": list(options.picture)}


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
