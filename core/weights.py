"""Where the weights of a graph lie: initializers refer to files under one root folder and are never read to be moved.

A graph's external data is looked up in its own folder, unless the manifest beside it records another `weights_root`.
onnxruntime takes that root as a session option, TensorRT as the folder of the path given to `parse(bytes, path)`.
"""

import math
import os
import shutil
from pathlib import Path

import onnx

from suture.core.errors import UserError
from suture.core.head_sizes import write_head_sizes
from suture.core.manifest import MANIFEST, read_manifest
from suture.core.onnx_checks import check_model
from suture.core.outside import check_outside
from suture.core.reader import read_bytes
from suture.core.tensors import check_places, hub_folder, references, tensor_bytes

COPIED_BELOW = 1_000_000_000  # bytes of weights that each stage's folder may hold again
MODEL_LIMIT = 1 << 31  # bytes; protobuf's own
WRITTEN = (".onnx", ".json", ".svg")  # what a stage's folder has of its own, where weights cannot lie
TABLE_INPUTS = {"Gather": (0,), "RotaryEmbedding": (1, 2)}  # of which a step reads one row a token


def weights_root(model: Path) -> Path:
    """The folder that external data locations of the graph in file `model` are relative to, as load_graph gives them."""
    if cache := hub_folder(model.parent.resolve()):
        return cache
    manifest = read_manifest(model.parent)
    recorded = manifest.get("weights_root", ".") if manifest and model.name in manifest["outputs"] else "."
    if not isinstance(recorded, str) or "\0" in recorded:
        raise UserError(model.parent / MANIFEST, "its weights_root is not a folder", "write the graph again")
    return Path(os.path.normpath(model.parent / recorded))


def load_graph(model: Path, types: bool = True) -> onnx.ModelProto:
    """The graph of an ONNX file, its external weights left where they are but checked to be there; the size of a cached
    head written into its caches where only the rest of the graph tells it. Without `types` its tensors may be of types that
    operators do not take: surgery repairs what it can of these, and then asks again."""
    content = read_bytes(model, MODEL_LIMIT)
    try:
        proto = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf's DecodeError has no public base across versions
        raise UserError(model, f"not an ONNX file ({type(error).__name__})", "export it again") from None
    if not proto.graph.node and not proto.graph.output:
        raise UserError(model, "not an ONNX graph: it has no nodes and no outputs", "export it again")
    check_model(proto, model, types)
    root, folder = weights_root(model), model.parent
    if hub_folder(folder.resolve()) == root:
        check_places(proto, model, folder)
        _follow_links(proto, folder.resolve(), root)
    else:
        check_places(proto, model, root)
        check_outside(proto, model, root)
    write_head_sizes(proto)
    return proto


def check_references(proto: onnx.ModelProto, model: Path) -> None:
    """Raises UserError if a weight is missing, truncated, or refers to a file outside the graph's weights root."""
    check_places(proto, model, weights_root(model))


def weight_files(proto: onnx.ModelProto, root: Path) -> list[Path]:
    """The files that a graph's tensors refer to, each once."""
    return sorted({root / reference["location"] for _, reference in references(proto)})


def streamed_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of weights that a decoding step of one token reads: all of each, but of tables one row."""
    read: set[str] = set()
    tables: set[str] = set()
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            (tables if place in TABLE_INPUTS.get(node.op_type, ()) else read).add(name)
    weights = 0.0
    for tensor in proto.graph.initializer:
        whole = tensor_bytes(tensor)
        if tensor.name in read:
            weights += whole
        elif tensor.name in tables:
            weights += whole / max(tensor.dims[0] if tensor.dims else 1, 1)
    return math.ceil(weights)


def place_weights(proto: onnx.ModelProto, model: Path, folder: Path, out: Path) -> str:
    """Makes the weights of the graph in file `model` reachable for a graph written into `folder` (which becomes `out`).

    Small weights beside the graph are copied, so that the new graph stands alone; large ones, and those of a checkpoint,
    stay where they are. Never linked: onnx refuses to read a file with two names, the source's own included. Returns
    the `weights_root` for the new manifest, relative to `out`.
    """
    root = weights_root(model)
    return place_below(proto, model, root, root == Path(os.path.normpath(model.parent)), folder, out)


def place_below(proto: onnx.ModelProto, where: Path, root: Path, beside: bool, folder: Path, out: Path) -> str:
    """The same for a graph whose weights lie under `root`, `beside` what it is made of or elsewhere."""
    check_places(proto, where, root)
    locations = {reference["location"] for _, reference in references(proto)}
    size = sum((root / location).stat().st_size for location in locations)
    hidden = any(location.endswith(WRITTEN) or location.startswith(".") for location in locations)
    if not beside or hidden or size >= COPIED_BELOW:
        return os.path.relpath(root, out)
    for location in locations:
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / location, folder / location)
    return "."


def _follow_links(proto: onnx.ModelProto, folder: Path, root: Path) -> None:
    """Makes the locations in a Hugging Face snapshot those of the files that its links lead to: onnxruntime follows none."""
    for tensor, reference in references(proto):
        target = (folder / reference["location"]).resolve()
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(target.relative_to(root))
