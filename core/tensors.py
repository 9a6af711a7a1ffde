"""Every tensor of a model that may refer to a file, and where its bytes lie: the one list that readers and writers go by.

ONNX lets any TensorProto name a file: initializers, dense and sparse, and attributes of any node, also in subgraphs, in
functions, and in graphs that describe training. A location is checked here and nowhere else.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

import onnx
from onnx import TensorProto

from suture.core import dtypes, reader
from suture.core.errors import UserError

UNSIZED = (TensorProto.UNDEFINED, TensorProto.STRING)  # an element has no number of bytes
BYTES = (TensorProto.UINT8, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2,
         TensorProto.FLOAT8E5M2FNUZ, TensorProto.FLOAT8E8M0)  # fmt: skip
EMBEDDED = 1024  # bytes; what onnx itself leaves in the graph, where it saves weights beside it
KEPT_INSIDE = "keep weights below the model's own folder"


def every_tensor(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Each TensorProto in the model, wherever it stands."""
    graphs = [model.graph, *(graph for each in model.training_info for graph in (each.initialization, each.algorithm))]
    attributes = [attribute for function in model.functions for attribute in function.attribute_proto]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes or attributes:
        for graph in graphs:
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
        attributes += [attribute for node in nodes for attribute in node.attribute]
        graphs, nodes = [], []
        for attribute in attributes:
            dense, sparse = [*attribute.tensors], [*attribute.sparse_tensors]
            if attribute.HasField("t"):
                dense.append(attribute.t)
            if attribute.HasField("sparse_tensor"):
                sparse.append(attribute.sparse_tensor)
            yield from dense
            for each in sparse:
                yield from (each.values, each.indices)
            graphs += attribute.graphs
            if attribute.HasField("g"):
                graphs.append(attribute.g)
        attributes = []


def references(model: onnx.ModelProto) -> Iterator[tuple[TensorProto, dict[str, str]]]:
    """Each tensor that lies outside the model's file, with location, offset and length."""
    return external(every_tensor(model))


def external(tensors: Iterable[TensorProto]) -> Iterator[tuple[TensorProto, dict[str, str]]]:
    """Those of the tensors that lie outside the model's file, with location, offset and length."""
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor, {entry.key: entry.value for entry in tensor.external_data}


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes that a weight takes, whatever says where they are."""
    return math.ceil(math.prod(tensor.dims) * stored_size(tensor.data_type))


def stored_size(dtype: int) -> float:
    """Bytes of an element of an onnx.TensorProto type."""
    known = dtypes.BY_ONNX.get(dtype)
    return known.bytes if known else onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize


def check_places(model: onnx.ModelProto, where: Path, root: Path, but: Collection[str] = ()) -> None:
    """Raises UserError unless every tensor's bytes lie in a regular file below `root` that has them, or at one of the
    locations `but`. `where`: the model's file, for errors."""
    sizes: dict[str, int] = {}
    for tensor, reference in references(model):
        if reference.get("location") in but:
            continue
        needed = _needed(tensor, where)
        offset, length = _numbers(tensor, reference, where)
        location = reference["location"]
        if location not in sizes:
            sizes[location] = reader.status(inside(root, location, where), "put it back, or export again").st_size
        if length is not None and length != needed:
            wrong = f"{_name(tensor)} refers to {length:,} bytes, and its shape and type need {needed:,}"
            raise UserError(where, wrong, "export it again")
        if offset + needed > sizes[location]:
            raise UserError(
                root / location,
                f"truncated: {sizes[location]} bytes, but {_name(tensor)} ends at {offset + needed}",
                "copy or download the file again",
            )


def embed_small(model: onnx.ModelProto, where: Path, root: Path) -> None:
    """Reads tensors below EMBEDDED bytes that lie in other files into the model: shapes, axes and scales, without whose
    values onnx infers no shapes and converts no opset. Raises UserError as check_places does."""
    for tensor, reference in references(model):
        if (size := _needed(tensor, where)) < EMBEDDED:
            offset, _ = _numbers(tensor, reference, where)
            with reader.open_regular(inside(root, reference["location"], where)) as file:
                file.seek(offset)
                content = file.read(size)
            if len(content) < size:
                raise UserError(root / reference["location"], f"ends within {_name(tensor)}", "copy or download the file again")
            tensor.raw_data = content
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]


def misplaced(tensor: TensorProto) -> bool:
    """Whether TensorRT's parser reads other values: of 8-bit types it takes int32_data, where each element has four bytes, for
    one byte each (TensorRT-RTX 1.7; signed ones and booleans it reads right)."""
    return tensor.data_type in BYTES and tensor.data_location != TensorProto.EXTERNAL and any(tensor.int32_data[1:])


def to_raw(model: onnx.ModelProto) -> None:
    """Puts values of 8-bit types into raw_data, which every reader takes for the same."""
    for tensor in every_tensor(model):
        if tensor.data_type in BYTES and tensor.int32_data:
            tensor.raw_data = bytes(value & 0xFF for value in tensor.int32_data)
            del tensor.int32_data[:]


def inside(root: Path, location: str, where: Path) -> Path:
    """The file at `location` below `root`, symbolic links followed. Raises UserError where it lies elsewhere."""
    parts = PurePosixPath(location)
    if not location or "\0" in location or parts.is_absolute() or ".." in parts.parts:
        raise UserError(where, f"weights at {location} lie outside {root}", KEPT_INSIDE)
    try:
        path, folder = (root / location).resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, a name that is too long
        raise UserError(root / location, f"cannot be read ({error})", KEPT_INSIDE) from None
    cache = hub_folder(folder)
    if not path.is_relative_to(folder) and not (cache and path.is_relative_to(cache / "blobs")):
        raise UserError(where, f"weights at {location} lie outside {root}", KEPT_INSIDE)
    return path


def hub_folder(folder: Path) -> Path | None:
    """The models--OWNER--NAME folder of the Hugging Face cache that a resolved folder is a snapshot in: its files are links
    into `blobs` there."""
    for below, cache in zip([folder, *folder.parents], folder.parents):
        if below.name == "snapshots" and cache.name.startswith("models--"):
            return cache
    return None


def _needed(tensor: TensorProto, where: Path) -> int:
    if tensor.data_type in UNSIZED or tensor.data_type not in TensorProto.DataType.values():
        raise UserError(where, f"{_name(tensor)} has a type that cannot lie in another file", "export it again")
    if any(size < 0 for size in tensor.dims):
        raise UserError(where, f"{_name(tensor)} has a negative size", "export it again")
    return tensor_bytes(tensor)


def _numbers(tensor: TensorProto, reference: dict[str, str], where: Path) -> tuple[int, int | None]:
    """Offset and, where there is one, length."""
    if len(tensor.external_data) != len(reference) or "location" not in reference:
        raise UserError(where, f"{_name(tensor)} does not say once where its bytes are", "export it again")
    for key in ("offset", "length"):
        value = reference.get(key, "0")
        if not (value.isascii() and value.isdigit() and len(value) < 20):
            raise UserError(where, f"{_name(tensor)} has {key} {value[:40]!r}, which is not a size", "export it again")
    return int(reference.get("offset", 0)), int(reference["length"]) if "length" in reference else None


def _name(tensor: TensorProto) -> str:
    return tensor.name or "a tensor without name"
