"""A pipeline's folder to a model that can be stepped here: the engine, onnxruntime on CUDA, or onnxruntime on the CPU."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnxruntime as ort
import torch

from suture.core.errors import UserError
from suture.core.manifest import recorded_option, result
from suture.core.parts import DECODER, PartFolder, find_parts
from suture.core.shadow_copy import has_bfloat16
from suture.core.signature import EMBEDDINGS
from suture.core.weights import load_graph, streamed_bytes
from suture.runtime.engine import read_description, why_not
from suture.runtime.engine_decoder import EngineModel, open_engine
from suture.runtime.graphs import OnnxDecoder, open_embedding, open_to_generate

GRAPHS = ("surgery/model.onnx", "export/model.onnx")  # of a part, the first of them that is there
CHUNK = 512  # tokens of a prompt read in one step


@dataclass(frozen=True)
class Files:
    """Of a pipeline's folder what generating needs; None where a stage has not written it."""

    graph: Path | None
    engine: Path | None
    checkpoint: Path
    others: dict[str, Path] = field(default_factory=dict)  # the graphs of the model's other parts, by name
    embed: Path | None = None  # that of them which makes the decoder's embeddings of tokens, where it takes such


@dataclass(frozen=True)
class Opened:
    model: OnnxDecoder | EngineModel
    rows: int | None  # the most sequences side by side
    chunk: int  # the most tokens of one sequence in a step
    device: str  # "cpu" or "cuda"
    weight_bytes: int  # that a decoding step reads
    what: str  # for the user


def find_files(out: Path, checkpoint: Path | None) -> Files:
    """`out`: a pipeline's folder, or one of its decoder's graphs. Raises UserError where there is nothing to run."""
    parts = _parts(out)
    decoder = next((part for part in parts if part.kind == DECODER), None)
    if decoder is None:
        names = ", ".join(part.name for part in parts)
        remedy = (
            "for a picture, add --picture FILE.png" if any(part.name == "vae_decoder" for part in parts) else "name another"
        )
        raise UserError(out, f"has no part that writes text: its parts are {names}", remedy)
    folder = decoder.folder
    graph = out if out.is_file() else first_result(folder, *GRAPHS)
    engine = None if out.is_file() else first_result(folder, "build/model.engine")
    if graph is None and engine is None:
        raise UserError(folder, "has neither surgery/model.onnx nor export/model.onnx", "name the --out folder of pipeline.py")
    recorded = recorded_option(folder / "export", "checkpoint")
    found = checkpoint or (Path(recorded) if recorded and "\0" not in recorded else None)
    if found is None or not found.is_dir():
        wrong = "is not a folder" if found else "does not say from which checkpoint it came"
        raise UserError(found or out, wrong, "name the checkpoint, whose tokenizer is needed, with --checkpoint DIR")
    graphs = {part.name: first_result(part.folder, *GRAPHS) for part in parts if part is not decoder}
    others = {name: path for name, path in graphs.items() if path is not None}
    return Files(graph, engine, found, others, others.get(decoder.source(EMBEDDINGS)))


def _parts(out: Path) -> tuple[PartFolder, ...]:
    """Of a graph OUT/STAGE/MODEL.onnx or OUT/PART/STAGE/MODEL.onnx the parts of OUT."""
    if not out.is_file():
        return find_parts(out)
    folder = out.parent.parent
    around = find_parts(folder.resolve().parent)
    return around if any(part.folder.resolve() == folder.resolve() for part in around) else find_parts(folder)


def open_model(files: Files, runtime: str) -> Opened:
    """`runtime`: "engine", "cuda", "cpu", or "auto" for the first of these that can run here."""
    reason = _why_no_engine(files.engine)
    if runtime == "engine" and reason:
        raise UserError(files.engine or "engine", reason, "take --runtime auto")
    if files.graph is None and (reason or runtime in ("cuda", "cpu")):
        raise UserError(files.engine, reason or "has no graph beside it", "run the pipeline here")
    proto = load_graph(files.graph) if files.graph else None
    if reason is None and runtime in ("auto", "engine"):
        model = _embedding(open_engine(files.engine), files)
        rows, width = model.largest_step
        held = model.engine.description["weights"]  # all of them: which are tables only a graph says
        size = streamed_bytes(proto) if proto else held["constant_bytes"] + sum(each["bytes"] for each in held["inputs"])
        chunk = width if model.bidirectional else min(width, CHUNK)
        return Opened(model, rows, chunk, "cuda", size, f"{files.engine} on {torch.cuda.get_device_name()}")
    cuda = torch.cuda.is_available() and "CUDAExecutionProvider" in ort.get_available_providers()
    if runtime == "cuda" and not cuda:
        raise UserError("--runtime cuda", "onnxruntime has no CUDA provider here", "pip install onnxruntime-gpu, or take auto")
    device = "cuda" if cuda and runtime != "cpu" else "cpu"
    model = _embedding(open_to_generate(files.graph, device), files)
    place = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    what = f"{files.graph} in onnxruntime on {place}"
    if has_bfloat16(proto) and not (device == "cuda" and model.signature.static):
        what += " (bfloat16, which it computes as float32 here: slower, and not the same rounding)"
    return Opened(model, None, sys.maxsize if model.bidirectional else CHUNK, device, streamed_bytes(proto), what)


def _embedding(model: OnnxDecoder | EngineModel, files: Files) -> OnnxDecoder | EngineModel:
    """A model that takes embeddings gets its own. Raises UserError where nothing makes them of tokens."""
    if model.signature.embedding_width is None:
        return model
    if files.embed is None:
        where = files.graph or files.engine
        raise UserError(where, "takes embeddings, and no part beside it makes them of tokens", "export the whole checkpoint")
    return replace(model, embed=open_embedding(files.embed))


def _why_no_engine(engine: Path | None) -> str | None:
    if engine is None:
        return "no engine has been built"
    description = read_description(engine.with_name("engine.json"))
    return "it is not a decoder with a KV cache" if description["signature"] is None else why_not(description)


def first_result(folder: Path, *names: str) -> Path | None:
    """The first of these results, STAGE/FILE, that its stage's last run has written."""
    found = (result((folder / name).parent, Path(name).name) for name in names)
    return next((path for path in found if path is not None), None)
