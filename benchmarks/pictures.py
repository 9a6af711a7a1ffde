"""How many of tiny-sd's pictures show what was asked for: in PyTorch, the portable graphs, TensorRT's network; and with faults planted.

    python -m benchmarks.pictures OUT [--count 100] [--steps 10] [--only portable network faults]

OUT: a folder that `suture run --model tiny-sd --out OUT` has made. A fault is one change of the UNet's portable graph.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from suture.core import arguments
from suture.core.command import CommandParser, run
from suture.core.manifest import recorded_option
from suture.core.parts import find_parts
from suture.core.sessions import FUSED, new_session
from suture.core.weights import load_graph, weights_root
from suture.models.drawn_pictures import distinct_scene
from suture.models.pictures import PictureModel
from suture.runtime.networks import Arrays, Network, in_network, in_onnxruntime
from suture.validate.pictures import GUIDANCE, in_pytorch, scenes_shown

ROWS = ("pytorch", "portable", "network", "faults")
Fault = Callable[[onnx.GraphProto], None]


def main() -> None:
    parser = CommandParser(prog="pictures", description="Count the pictures that show what was asked for.")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--count", type=arguments.whole(1, 1000), default=100, help="of scenes (%(default)s)")
    parser.add_argument("--steps", type=arguments.whole(1, 1000), default=10, help="of denoising (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    options = parser.parse_args()
    folders = {part.name: part.folder for part in find_parts(options.out)}
    checkpoint = Path(recorded_option(folders["unet"] / "export", "checkpoint"))
    scenes = [distinct_scene(np.random.default_rng(seed), 64, 64) for seed in range(options.count)]
    portable = {name: in_onnxruntime(folder / "surgery/model.onnx", fast=True) for name, folder in folders.items()}

    def row(name: str, networks: dict[str, Network]) -> None:
        started = time.monotonic()
        shown = scenes_shown(PictureModel(checkpoint, networks), scenes, options.steps, GUIDANCE)
        print(f"| {name} | {shown} of {len(scenes)} | {time.monotonic() - started:.0f} s |", flush=True)

    if "pytorch" in options.only:
        row("PyTorch, float32", in_pytorch(checkpoint, TensorProto.FLOAT16))
    if "portable" in options.only:
        row("portable graphs", portable)
    if "network" in options.only:
        row("TensorRT's network", {name: in_network(folder / "surgery/model.trt.onnx") for name, folder in folders.items()})
    if "faults" in options.only:
        for name, fault in FAULTS.items():
            row(name, {**portable, "unet": damaged(folders["unet"] / "surgery/model.onnx", fault)})


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


def residuals_dropped(graph: onnx.GraphProto) -> None:
    zero = numpy_helper.from_array(np.zeros((), np.float16), "fault/zero")
    graph.initializer.append(zero)
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name.startswith(("down_block_res_sample", "mid_block_res_sample")) and node.op_type == "Add":
                node.input[place] = zero.name


FAULTS: dict[str, Fault] = {
    "attention without its scale": no_scale,
    "keys in the place of values": keys_for_values,
    "Swish left out": swish_left_out,
    "skip connections exchanged": skips_exchanged,
    "the ControlNet's residuals dropped": residuals_dropped,
}

if __name__ == "__main__":
    run("pictures", main)
