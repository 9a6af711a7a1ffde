"""Kind 1: tensors whose bytes lie where a model may not read: wherever the tensor stands, and however the place is written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.abuse.case import CUTTERS, GRAPH_STAGES, SECOND, Case
from tests.abuse.graphs import small

PROMISE = "only regular files below the model's folder are read, and nothing outside --out is written"
STAGES = (*GRAPH_STAGES, *CUTTERS)
LENGTH = 64  # bytes: float32 [4, 4]
OUTSIDE = "lie outside"


def in_initializer(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.initializer[0].CopyFrom(tensor)


def in_constant(model: onnx.ModelProto, tensor: TensorProto) -> None:
    del model.graph.initializer[:]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["weight"], name="weight", value=tensor))


def in_branch(model: onnx.ModelProto, tensor: TensorProto) -> None:
    branch = model.graph.node[2].attribute[0].g
    tensor.name = "inner"
    branch.initializer.append(tensor)
    branch.node[0].CopyFrom(helper.make_node("MatMul", ["r", "inner"], list(branch.node[0].output)))


def in_loop(model: onnx.ModelProto, tensor: TensorProto) -> None:
    """A constant of a Loop's body, itself in an If's branch."""
    body = helper.make_graph(
        [helper.make_node("Constant", [], ["inner"], value=tensor), helper.make_node("MatMul", ["state", "inner"], ["next"]),
         helper.make_node("Identity", ["on"], ["going"])],
        "body", [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("on", TensorProto.BOOL, []),
                 helper.make_tensor_value_info("state", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("going", TensorProto.BOOL, []), helper.make_tensor_value_info("next", TensorProto.FLOAT, ["batch", 4])],
    )  # fmt: skip
    branch = model.graph.node[2].attribute[0].g
    branch.node[0].CopyFrom(helper.make_node("Loop", ["", "flag", "r"], list(branch.node[0].output), body=body))


def in_function(model: onnx.ModelProto, tensor: TensorProto) -> None:
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("MatMul", ["a", "w"], ["b"])]
    model.functions.append(helper.make_function("own", "Own", ["a"], ["b"], nodes, [helper.make_opsetid("", 18)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node[1].CopyFrom(helper.make_node("Own", ["m"], ["r"], domain="own"))


def in_sparse(model: onnx.ModelProto, tensor: TensorProto) -> None:
    del model.graph.initializer[:]
    tensor.dims[:] = [16]
    indices = numpy_helper.from_array(np.arange(16), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [4, 4]))


def in_attribute(model: onnx.ModelProto, tensor: TensorProto) -> None:
    """One of several tensors of an attribute of a custom operator."""
    model.opset_import.append(helper.make_opsetid("own", 1))
    node = helper.make_node("Table", ["m"], ["r"], domain="own")
    node.attribute.append(helper.make_attribute("tables", [tensor]))
    model.graph.node[1].CopyFrom(node)


def in_training(model: onnx.ModelProto, tensor: TensorProto) -> None:
    info = model.training_info.add()
    info.algorithm.name = "training"
    info.algorithm.initializer.append(tensor)


TENSORS = (in_initializer, in_constant, in_branch, in_loop, in_function, in_sparse, in_attribute, in_training)


def leads_to(target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "link").symlink_to(target)


PLACES = {  # how the place is written: {work} is the folder above; what makes it; words of the refusal
    "a folder above": ("../secret", None, OUTSIDE),
    "a folder above, by a detour": ("sub/../../secret", lambda folder: (folder / "sub").mkdir(), OUTSIDE),
    "absolute": ("{work}/secret", None, OUTSIDE),
    "of the system": ("/etc/passwd", None, OUTSIDE),
    "a link out": ("link", leads_to("../secret"), OUTSIDE),
    "a folder's link out": ("link/secret", leads_to(".."), OUTSIDE),
    "a device": ("link", leads_to("/dev/zero"), OUTSIDE),
    "a FIFO": ("fifo", lambda folder: os.mkfifo(folder / "fifo"), "is not a regular file"),
    "a folder": ("sub", lambda folder: (folder / "sub").mkdir(), "is a folder"),
}


FURTHER = {  # other ways to write it, for some of the tensors
    "the environment": ("/proc/self/environ", None, OUTSIDE),
    "two slashes": ("//etc/passwd", None, OUTSIDE),
    "dots and slashes": ("./.././graphs/..//secret", None, OUTSIDE),
    "links in a chain": ("link", lambda folder: ((folder / "next").symlink_to("../secret"), leads_to("next")(folder)), OUTSIDE),
    "a link to an open file": ("link", leads_to("/proc/self/fd/0"), ""),
    "a URL": ("file:///etc/passwd", None, ""),
    "a home": ("~/secret", None, ""),
    "backslashes": ("..\\secret", None, ""),
    "an end of text": ("model.data\0../secret", None, ""),
}


def placed(stand: Callable, location: str, make: Callable | None, offset: int = 0) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        for folder in (work / "graphs", work / "static", work / "pair"):
            tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
            for key, value in (("location", location.format(work=work)), ("offset", str(offset)), ("length", str(LENGTH))):
                tensor.external_data.add(key=key, value=value)
            model = small()
            stand(model, tensor)
            (folder / "model.onnx").write_bytes(model.SerializeToString())
            if make:
                make(folder)

    return damage


ROOTS = {  # a manifest beside the graph: its weights_root, the location below it, the hash that it records of that file
    "the whole disk": ("/", "etc/passwd", None),
    "the system's settings": ("/etc", "passwd", None),
    "the folder above": ("..", "secret", None),
    "an absolute folder": ("{work}", "secret", None),
    "another model's weights": ("../library", "tokenizer.json", None),
    "a folder by a detour": ("../graphs/../pair/..", "secret", None),
    "with another's hash": ("..", "secret", "0" * 64),
    "with no hash": ("..", "secret", ""),
}


def of_another(stand: Callable) -> Callable[[Path], None]:
    """A tensor in another model's safetensors file, which has weights where it says."""

    def damage(work: Path) -> None:
        placed(stand, "../checkpoint/model.safetensors", None, offset=1 << 16)(work)

    return damage


def recorded(root: str, location: str, sha: str | None) -> Callable[[Path], None]:
    """A manifest of the graph's own stage, whose author has not read what it points to."""

    def damage(work: Path) -> None:
        placed(in_initializer, location, None)(work)
        for folder in (work / "graphs", work / "static", work / "pair"):
            base = root.format(work=work)
            said = {"outputs": {"model.onnx": 1}, "weights_root": base}
            if sha is not None:
                entry = os.path.relpath(os.path.join(folder, base, location), folder)
                said["content"] = {entry: {"sha256": sha, "size": (work / "secret").stat().st_size}}
            (folder / "manifest.json").write_text(json.dumps(said))

    return damage


CASES = [
    Case(1, stage, f"{name} as weights_root", PROMISE, recorded(*root), "has changed since" if root[2] is not None else OUTSIDE)
    for stage in STAGES for name, root in ROOTS.items()
] + [
    Case(1, stage, f"another model's safetensors {stand.__name__}", PROMISE, of_another(stand), OUTSIDE)
    for stage in STAGES for stand in (in_initializer, in_constant)
] + [
    Case(1, stage, f"{name} {stand.__name__}", PROMISE, placed(stand, location, make), says)
    for stage in STAGES for stand in TENSORS for name, (location, make, says) in PLACES.items()
] + [
    Case(1, stage, f"{name} {stand.__name__}", PROMISE, placed(stand, location, make), says)
    for stage in STAGES for stand in (in_initializer, in_function, in_loop) for name, (location, make, says) in FURTHER.items()
] + [
    Case(1, "surgery.join", f"{name} {stand.__name__} of the second", PROMISE, placed(stand, location, make), says, arguments=SECOND)
    for stand in TENSORS for name, (location, make, says) in PLACES.items()
]  # fmt: skip
