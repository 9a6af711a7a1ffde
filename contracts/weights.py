"""Where the weights of a graph lie: initializers refer to files under one root folder and are never read to be moved.

A graph's external data is looked up in its own folder, unless the manifest beside it records another `weights_root`.
onnxruntime takes that root as a session option, TensorRT as the folder of the path given to `parse(bytes, path)`.
"""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from contracts.errors import UserError
from contracts.head_sizes import write_head_sizes
from contracts.manifest import read_manifest

COPIED_BELOW = 1_000_000_000  # bytes of weights that each stage's folder may hold again
STORED = {TensorProto.INT4: 0.5, TensorProto.UINT4: 0.5, TensorProto.FLOAT4E2M1: 0.5}  # bytes an element, where numpy's differ
TABLE_INPUTS = {"Gather": (0,), "RotaryEmbedding": (1, 2)}  # of which a step reads one row a token
ORT_ROOT_OPTION = "session.model_external_initializers_file_folder_path"


def weights_root(model: Path) -> Path:
    """The folder that external data locations of the graph in file `model` are relative to."""
    manifest = read_manifest(model.parent) or {}
    recorded = manifest.get("weights_root", ".") if model.name in manifest.get("outputs", {}) else "."
    return Path(os.path.normpath(model.parent / recorded))


def load_graph(model: Path) -> onnx.ModelProto:
    """The graph of an ONNX file, its external weights left where they are but checked to be there; the size of a cached
    head written into its caches where only the rest of the graph tells it."""
    try:
        proto = onnx.load(model, load_external_data=False)
    except FileNotFoundError:
        raise UserError(model, "no such file", "check the path") from None
    except IsADirectoryError:
        raise UserError(model, "is a folder", "name an .onnx file") from None
    except Exception as error:  # protobuf's DecodeError has no public base across versions
        raise UserError(model, f"not an ONNX file ({type(error).__name__})", "export it again") from None
    if not proto.graph.node:
        raise UserError(model, "not an ONNX graph: it has no nodes", "export it again")
    check_references(proto, model)
    write_head_sizes(proto)
    return proto


def check_references(proto: onnx.ModelProto, model: Path) -> None:
    """Raises UserError if a weight is missing, truncated, or refers to a file outside the graph's weights root."""
    root = weights_root(model)
    sizes: dict[str, int] = {}
    for tensor, reference in references(proto):
        location = reference["location"]
        if location not in sizes:
            sizes[location] = _checked_file(root, location, model).stat().st_size
        end = int(reference.get("offset", 0)) + int(reference.get("length", 0))
        if end > sizes[location]:
            raise UserError(
                root / location,
                f"truncated: {sizes[location]} bytes, but {tensor.name} ends at {end}",
                "copy or download the file again",
            )


def references(proto: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, dict[str, str]]]:
    """Each initializer that lies outside the graph's file, with location, offset and length."""
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor, {entry.key: entry.value for entry in tensor.external_data}


def streamed_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of weights that a decoding step of one token reads: all of each, but of tables one row."""
    read, tables = set(), set()
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            (tables if place in TABLE_INPUTS.get(node.op_type, ()) else read).add(name)
    external = {tensor.name: int(reference.get("length", 0)) for tensor, reference in references(proto)}
    weights = 0
    for tensor in proto.graph.initializer:
        whole = external.get(tensor.name) or tensor_bytes(tensor)
        if tensor.name in read:
            weights += whole
        elif tensor.name in tables:
            weights += whole / max(tensor.dims[0] if tensor.dims else 1, 1)
    return math.ceil(weights)


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes that a weight takes, whatever says where they are."""
    return math.ceil(math.prod(tensor.dims) * stored_size(tensor.data_type))


def stored_size(dtype: int) -> float:
    """Bytes of an element of an onnx.TensorProto type."""
    return STORED.get(dtype) or onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize


def place_weights(proto: onnx.ModelProto, model: Path, folder: Path, out: Path) -> str:
    """Makes the weights of the graph in file `model` reachable for a graph written into `folder` (which becomes `out`).

    Small weights beside the graph are copied, so that the new graph stands alone; large ones, and those of a checkpoint,
    stay where they are. Never linked: onnx refuses to read a file with two names, the source's own included. Returns
    the `weights_root` for the new manifest, relative to `out`.
    """
    root = weights_root(model)
    locations = {reference["location"] for _, reference in references(proto)}
    size = sum((root / location).stat().st_size for location in locations)
    stands_alone = root == Path(os.path.normpath(model.parent)) and size < COPIED_BELOW
    if not stands_alone:
        return os.path.relpath(root, out)
    for location in locations:
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / location, folder / location)
    return "."


def _checked_file(root: Path, location: str, model: Path) -> Path:
    path = (root / location).resolve()
    if os.path.isabs(location) or not path.is_relative_to(root.resolve()):
        raise UserError(model, f"weights at {location} lie outside {root}", "keep them below the model's own folder")
    if not path.is_file():
        raise UserError(root / location, "weights file is missing", "put it back, or export again")
    return path
