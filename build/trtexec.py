"""trtexec.txt: the commands that build the same engine on another machine, with nothing of this project on it.

trtexec is standard TensorRT's, tensorrt_rtx TensorRT-RTX's. Both look a graph's weights up beside the graph's file, and take
the types from the graph, which is strongly typed: standard TensorRT up to 10 takes a flag for that.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from suture.build.profiles import Profile

PROGRAMS = {"standard": "trtexec", "rtx": "tensorrt_rtx"}
BOUNDS = ("min", "opt", "max")


def commands(
    model: Path,
    root: Path,
    out: Path,
    engine: str,
    profiles: Sequence[Profile],
    capabilities: Sequence[str],
    *,
    external: bool,
    plugins: Sequence[Path] = (),
    bound: bool = False,
) -> str:
    """The file's text. `root`: the weights' folder; `external`: whether any weights lie in it; `out`: where the file will
    be, which its paths are relative to; `bound`: whether the engine beside it takes weights as inputs."""
    graph, place = (os.path.relpath(path, out) for path in (model, root))
    lines = ["# From this folder. Paths are as on the machine that wrote this."]
    if external and root.resolve() != model.parent.resolve():
        graph = os.path.join(place, model.name)
        copy = shlex.join(["cp", os.path.relpath(model, out), graph])
        lines += [f"# The graph's weights lie in {place}, and are looked up beside the graph:", copy]
    if bound:
        lines.append("# The engine beside this takes weights as inputs; these commands put them into the engine.")
    for kind, program in PROGRAMS.items():
        words = [program, f"--onnx={graph}", f"--saveEngine={engine}"]
        words += ["--stronglyTyped"] if kind == "standard" else [f"--computeCapabilities={_numbers(capabilities)}"]
        words += [f"--dynamicPlugins={os.path.relpath(plugin, out)}" for plugin in plugins if kind == "standard"]
        words += _shapes(profiles)
        words += ["--skipInference"]
        titles = {
            "standard": "standard TensorRT, on the GPU it is for (TensorRT 11: without --stronglyTyped)",
            "rtx": "TensorRT-RTX, on any machine" + " (this program loads no plugins)" * bool(plugins),
        }
        lines += ["", f"# {titles[kind]}", " \\\n    ".join(map(shlex.quote, words))]
    return "\n".join(lines) + "\n"


def _shapes(profiles: Sequence[Profile]) -> list[str]:
    words = []
    for index, profile in enumerate(profiles):
        words += [f"--profile={index}"] * (len(profiles) > 1)
        for which, bound in enumerate(BOUNDS):
            shapes = (f"{_name(name)}:{'x'.join(map(str, ranges[which]))}" for name, ranges in profile.shapes.items())
            words.append(f"--{bound}Shapes={','.join(shapes)}")
    return words


def _name(name: str) -> str:
    """A tensor's name as these programs read it: one with a colon or a comma in it needs quotes of its own."""
    return f"'{name}'" if set(name) & set(":,") else name


def _numbers(capabilities: Sequence[str]) -> str:
    return ",".join(each.replace(".", "") for each in capabilities)
