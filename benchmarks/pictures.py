"""How many of tiny-sd's pictures show what was asked for: in PyTorch, the portable graphs, TensorRT's network; and with faults planted.

    python -m benchmarks.pictures OUT [--count 100] [--steps 10] [--only portable network no_scale ...]

OUT: a folder that `suture run --model tiny-sd --out OUT` has made. A fault is one change of the UNet's portable graph; whether it
shows in pictures or not, level 2's comparison of this graph with the exported one has to find it, and the last column says what it
finds. The table is docs/pictures.md's, the numbers docs/measurements/pictures.json's: rows that are not asked for stay as they were.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.tables import DOCS, put
from suture.core import arguments
from suture.core.command import CommandParser, run
from suture.core.manifest import recorded_option
from suture.core.parts import PartFolder, find_parts
from suture.core.sessions import FUSED, new_session
from suture.core.tolerances import between_sessions
from suture.core.weights import load_graph, weights_root
from suture.models.drawn_pictures import distinct_scene
from suture.models.pictures import PictureModel
from suture.runtime.networks import Arrays, Network, in_network, in_onnxruntime
from suture.validate import graph_part
from suture.validate.pictures import GUIDANCE, in_pytorch, scenes_shown

PAGE, RESULTS, COMMAND = DOCS / "pictures.md", DOCS / "measurements" / "pictures.json", "python -m benchmarks.pictures OUT"
Fault = Callable[[onnx.GraphProto], None]


def main() -> None:
    parser = CommandParser(prog="pictures", description="Count the pictures that show what was asked for.")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--count", type=arguments.whole(1, 1000), default=100, help="of scenes (%(default)s)")
    parser.add_argument("--steps", type=arguments.whole(1, 1000), default=10, help="of denoising (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=(*ROWS, *FAULTS), default=(*ROWS, *FAULTS))
    parser.add_argument("--draft", action="store_true", help="print the rows, and leave the table as it is")
    options = parser.parse_args()
    parts = {part.name: part for part in find_parts(options.out)}
    folders = {name: part.folder for name, part in parts.items()}
    checkpoint = Path(recorded_option(folders["unet"] / "export", "checkpoint"))
    scenes = [distinct_scene(np.random.default_rng(seed), 64, 64) for seed in range(options.count)]
    portable = {name: in_onnxruntime(folder / "surgery/model.onnx", fast=True) for name, folder in folders.items()}
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.only:
        networks, level = portable, None
        if name == "pytorch":
            networks = in_pytorch(checkpoint, TensorProto.FLOAT16)
        elif name == "network":
            networks = {each: in_network(folder / "surgery/model.trt.onnx") for each, folder in folders.items()}
        elif name in FAULTS:
            unet = damaged(folders["unet"] / "surgery/model.onnx", FAULTS[name])
            networks, level = {**portable, "unet": unet}, level_2(parts["unet"], unet)
        started = time.monotonic()
        shown = scenes_shown(PictureModel(checkpoint, networks), scenes, options.steps, GUIDANCE)
        found[name] = {"shown": shown, "of": len(scenes), "steps": options.steps, "level 2": level}
        print(f"{said(name)}: {shown} of {len(scenes)}, level 2 {level}, {time.monotonic() - started:.0f} s", flush=True)
    if not options.draft:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(put(PAGE.read_text(), COMMAND, table(found)))


def table(found: dict[str, dict]) -> str:
    lines = ["| networks | pictures that show it | level 2 |", "| --- | ---: | --- |"]
    for name in (name for name in (*ROWS, *FAULTS) if name in found):
        row = found[name]
        lines.append(f"| {said(name)} | {row['shown']} of {row['of']} | {row['level 2'] or '–'} |")
    return "\n".join(lines)


def said(name: str) -> str:
    return ROWS.get(name) or f"fault: {' '.join(name.split('_'))}"


def level_2(part: PartFolder, candidate: Network) -> str:
    """What the comparison of the exported graph with this one finds."""
    exported = part.folder / "export/model.onnx"
    dtype, inputs = graph_part.make_inputs(exported, part, seed=0)
    reference, other = graph_part.in_onnxruntime(exported, "exported"), graph_part.Runnable("damaged", candidate)
    comparison = graph_part.compare_runs(reference, other, inputs, between_sessions({dtype}))
    worst = max(output.error for scenario in comparison.scenarios for output in scenario.outputs)
    return f"{comparison.status}, {worst:.0e}"


def damaged(path: Path, fault: Fault) -> Network:
    model = load_graph(path)
    fault(model.graph)
    session = new_session(model, weights_root(path), level=FUSED)
    names = [output.name for output in session.get_outputs()]
    halves = {each.name for each in session.get_inputs() if each.type == "tensor(float16)"}

    def network(inputs: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, {k: v.astype(np.float16) if k in halves else v for k, v in inputs.items()})))

    return network


def _attentions(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "Attention"]


def no_scale(graph: onnx.GraphProto) -> None:
    for node in _attentions(graph):
        kept = [attribute for attribute in node.attribute if attribute.name != "scale"]
        node.ClearField("attribute")
        node.attribute.extend([*kept, helper.make_attribute("scale", 1.0)])


def keys_for_values(graph: onnx.GraphProto) -> None:
    for node in _attentions(graph):
        node.input[1], node.input[2] = node.input[2], node.input[1]


def swish_left_out(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "Swish":
            node.op_type = "Identity"
            node.ClearField("attribute")


def skips_exchanged(graph: onnx.GraphProto) -> None:
    """The UNet's skip connections in front of what comes from below."""
    convolved = {name for node in graph.node if node.op_type in ("Conv", "Add", "Resize") for name in node.output}
    for node in graph.node:
        if node.op_type == "Concat" and len(node.input) == 2 and set(node.input) <= convolved:
            node.input[0], node.input[1] = node.input[1], node.input[0]


def one_time_step(graph: onnx.GraphProto) -> None:
    """500, whatever the step."""
    for value, name in ((0, "fault/none"), (500, "fault/time")):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == "timestep":
                node.input[place] = "fault/always"
    graph.node.insert(0, helper.make_node("Add", ["fault/nothing", "fault/time"], ["fault/always"]))
    graph.node.insert(0, helper.make_node("Mul", ["timestep", "fault/none"], ["fault/nothing"]))


def sine_for_cosine(graph: onnx.GraphProto) -> None:
    """Of the time step."""
    for node in graph.node:
        node.op_type = {"Sin": "Cos", "Cos": "Sin"}.get(node.op_type, node.op_type)


def gates_exchanged(graph: onnx.GraphProto) -> None:
    """Of each GEGLU: what is let through, and what lets through."""
    gates = {node.input[0] for node in graph.node if node.op_type == "Gelu"}
    for node in graph.node:
        if node.op_type == "Split" and gates & set(node.output):
            node.output[0], node.output[1] = node.output[1], node.output[0]


def residuals_dropped(graph: onnx.GraphProto) -> None:
    zero = numpy_helper.from_array(np.zeros((), np.float16), "fault/zero")
    graph.initializer.append(zero)
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name.startswith(("down_block_res_sample", "mid_block_res_sample")) and node.op_type == "Add":
                node.input[place] = zero.name


ROWS = {"pytorch": "PyTorch, float32", "portable": "portable graphs", "network": "TensorRT's network"}
PLANTED = (
    no_scale, keys_for_values, gates_exchanged, swish_left_out, skips_exchanged, residuals_dropped, one_time_step, sine_for_cosine,
)  # fmt: skip
FAULTS: dict[str, Fault] = {fault.__name__: fault for fault in PLANTED}

if __name__ == "__main__":
    run("pictures", main)
