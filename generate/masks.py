"""A picture and points in it, on the command line, to the picture of a mask."""

import argparse
from pathlib import Path

import numpy as np

from suture.core.errors import UserError
from suture.core.manifest import recorded_option, result
from suture.core.masks import BESIDE, DECODER, ENCODER, INSIDE, PIXELS, makes_masks
from suture.core.named import check_results, write_picture
from suture.core.parts import PartFolder, find_parts
from suture.core.read_pictures import read_picture
from suture.core.refusals import refusals
from suture.core.shadow_copy import runnable
from suture.core.weights import load_graph, weights_root
from suture.runtime.engine import Engine, read_description, run_once, why_not
from suture.runtime.graphs import fast_session
from suture.runtime.segment import Arrays, MaskPrompt, Run, Segmenter, open_processor

GRAPHS = ("surgery/model.onnx", "export/model.onnx")


def segment(options: argparse.Namespace) -> str:
    """Writes the mask, white on black, and says in one line what it is. Raises UserError where something cannot be read or run."""
    parts = {part.name: part for part in find_parts(options.out)}
    if not makes_masks(parts.values()):
        raise UserError(options.out, f"makes no masks: its parts are {', '.join(parts)}", "give --prompt TEXT")
    check_results({"--mask": options.mask}, [options.picture])
    picture = read_picture(options.picture)
    prompt = _prompt(options, *picture.size)
    (encode, side), (decode, _) = (_opened(parts[name], options.runtime) for name in (ENCODER, DECODER))
    recorded = options.checkpoint or recorded_option(parts[ENCODER].folder / "export", "checkpoint")
    found = Segmenter(open_processor(Path(recorded or options.out), side), encode, decode)(picture, prompt)
    write_picture(options.mask, found.best.astype(np.uint8) * 255)
    score, share = float(found.scores.max()), float(found.best.mean())
    return f"{options.mask}: {share:.1%} of the picture, expected intersection over union {score:.2f}"


def _prompt(options: argparse.Namespace, width: int, height: int) -> MaskPrompt:
    """Raises UserError for a point or a box that does not lie in the picture."""
    given = [(point, INSIDE) for point in options.point] + [(point, BESIDE) for point in options.beside]
    for option, (x, y) in [
        *(("--point", point) for point in options.point),
        *(("--beside", point) for point in options.beside),
    ]:
        if not (x < width and y < height):
            raise UserError(f"{option} {x:g},{y:g}", f"the picture has {width}×{height} pixels", "name a point in it")
    box = options.box
    if box is not None and not (box[0] < box[2] <= width and box[1] < box[3] <= height):
        shown = ",".join(f"{each:g}" for each in box)
        raise UserError(
            f"--box {shown}", f"is no LEFT,TOP,RIGHT,BOTTOM in {width}×{height} pixels", "name a box in the picture"
        )
    return MaskPrompt(tuple(point for point, _ in given), tuple(label for _, label in given), box)


def _opened(part: PartFolder, runtime: str) -> tuple[Run, int]:
    """The part's engine where one can run here, else its portable graph in onnxruntime; and the side of its pictures in pixels."""
    graph = next((path for name in GRAPHS if (path := result((part.folder / name).parent, "model.onnx"))), None)
    engine = result(part.folder / "build", "model.engine")
    if graph is None:
        raise UserError(part.folder, "has neither surgery/model.onnx nor export/model.onnx", "run the pipeline again")
    proto = load_graph(graph)
    sizes = {value.name: value.type.tensor_type.shape.dim[-1].dim_value for value in proto.graph.input}
    side = sizes.get(PIXELS, 0)
    if engine is not None and runtime in ("auto", "engine"):
        description = read_description(engine.with_name("engine.json"))
        reason = why_not(description)
        if reason is None:
            opened = Engine(engine, description, engine.parent / description["weights"]["root"])
            return (lambda inputs: run_once(opened, inputs)), side
    if runtime == "engine":
        raise UserError(part.folder, reason if engine else "no engine has been built", "leave --runtime out")
    session = fast_session(runnable(proto), weights_root(graph), str(graph), "cuda" if runtime == "cuda" else "cpu")
    halves = {value.name for value in session.get_inputs() if value.type == "tensor(float16)"}
    names = [value.name for value in session.get_outputs()]

    def run(inputs: Arrays) -> Arrays:
        feeds = {name: value.astype(np.float16) if name in halves else value for name, value in inputs.items()}
        with refusals(graph, "onnxruntime cannot run it", "export it again"):
            return dict(zip(names, session.run(names, feeds)))

    return run, side
