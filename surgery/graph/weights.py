"""Weights that a pass reads whole and writes anew, a slab at a time: repacked, never decoded, never in memory at once.

A new weight goes into the graph where it is small, else at the end of graph.weights_file, whose absolute path it then names
as its location; graph.added records which these are, for a graph that was read may not say so itself. All weights of a
finished graph lie under one root folder: `settle` copies what the graph still refers to elsewhere into the same file. Where
there is no such file, as in tests on small graphs, new weights stay in the graph.
"""

import itertools
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues

from suture.core.tensors import check_places, references, tensor_bytes
from suture.core.weights import place_weights
from suture.surgery.graph import Graph, is_external

INLINE = 1 << 16  # bytes; what is smaller stays in the graph
SLAB = 1 << 22  # elements that a transposition holds at once, bytes that a copy does
ALIGNMENT = 4096
Place = tuple[Path, int, int]  # file, offset and length of a weight's bytes


def new_file(folder: Path, stem: str = "repacked") -> Path:
    """A name for a weights file that nothing in the folder has: what lies there came from the source."""
    names = itertools.chain([f"{stem}.data"], (f"{stem}_{number}.data" for number in itertools.count(2)))
    return next(folder / name for name in names if not (folder / name).exists())


def read_bytes(graph: Graph, constant: gs.Constant) -> np.ndarray:
    """A constant's bytes, uint8 [bytes], mapped from its file where it lies outside the graph."""
    if not isinstance(constant._values, LazyValues):
        return np.frombuffer(np.ascontiguousarray(constant.values).tobytes(), np.uint8)
    tensor = constant._values.tensor
    if is_external(tensor):
        path, offset, length = _place(graph.root, tensor)
        return np.memmap(path, np.uint8, "r", offset, (length,))
    raw = tensor.raw_data or onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data
    return np.frombuffer(raw, np.uint8)


def read_array(graph: Graph, constant: gs.Constant, dtype: int) -> np.ndarray:
    """A constant's values, of a type of at least a byte, mapped from its file where it lies outside the graph."""
    values = read_bytes(graph, constant).view(onnx.helper.tensor_dtype_to_np_dtype(dtype))
    return values.reshape([int(size) for size in constant.shape])


def add_weight(graph: Graph, name: str, dtype: int, shape: list[int], slabs: Iterator[np.ndarray]) -> gs.Constant:
    """A new constant of this ONNX type and shape whose bytes are those of the slabs, one after the other."""
    tensor = TensorProto(name=graph.unique(name), data_type=dtype, dims=shape)
    if graph.weights_file is None or tensor_bytes(tensor) <= INLINE:
        tensor.raw_data = b"".join(slab.tobytes() for slab in slabs)
    else:
        offset, length = _append(graph.weights_file, slabs)
        graph.added.add(str(graph.weights_file.absolute()))
        _refer(tensor, str(graph.weights_file.absolute()), offset, length)
    return gs.Constant(tensor.name, LazyValues(tensor))


def place(constant: gs.Constant) -> tuple[str, int, int] | None:
    """Location, offset and length of a constant's bytes, or None where they are in the graph."""
    if not (isinstance(constant._values, LazyValues) and is_external(constant._values.tensor)):
        return None
    tensor = constant._values.tensor
    path, offset, length = _place(Path(), tensor)
    return str(path), offset, length


def follow(parts: list[gs.Constant]) -> bool:
    """Whether the parts' bytes follow one another in one file, in this order."""
    places = [place(part) for part in parts]
    return None not in places and all(
        (file, offset + length) == (next_file, next_offset)
        for (file, offset, length), (next_file, next_offset, _) in itertools.pairwise(places)
    )


def neighbours(graph: Graph, name: str, parts: list[gs.Constant], shape: list[int]) -> gs.Constant | None:
    """The parts as one constant, without moving a byte, where they follow one another in one file; else None."""
    if not follow(parts):
        return None
    places = [place(part) for part in parts]
    length = sum(length for _, _, length in places)
    return refer(graph, name, parts[0]._values.tensor.data_type, shape, places[0][0], places[0][1], length)


def refer(graph: Graph, name: str, dtype: int, shape: list[int], location: str, offset: int, length: int) -> gs.Constant:
    """A new constant of this ONNX type and shape whose bytes lie there."""
    tensor = TensorProto(name=graph.unique(name), data_type=dtype, dims=shape)
    _refer(tensor, location, offset, length)
    return gs.Constant(tensor.name, LazyValues(tensor))


def settle(
    models: list[onnx.ModelProto], root: Path, source: Path, folder: Path, out: Path, added: Collection[str] = ()
) -> str:
    """Makes the weights of `models`, made from the graph in file `source`, whose weights lie under `root`, reachable for
    graphs written into `folder` (which becomes `out`). Returns the `weights_root` for the manifest, relative to `out`.
    Raises UserError where a tensor of the models would not lie below it.

    Where passes `added` weights that the models still have, all others are copied behind them, each byte once, in the order
    in which the graphs name them.
    """
    for model in models:
        check_places(model, source, root, but=added)
    used = sorted(_locations(models) & set(added))
    if not used:
        return place_weights(models[0], source, folder, out)
    here = [location for location in used if Path(location).parent == folder.absolute()]
    file = Path(here[0]) if here else new_file(folder)
    wholes = _wholes({_place(root, tensor) for model in models for tensor, _ in references(model)})
    placed: dict[Place, int] = {}
    for model in models:
        for tensor, _ in references(model):
            path, offset, length = place = _place(root, tensor)
            if path != file:
                whole = wholes[place]
                if whole not in placed:
                    placed[whole], _ = _append(file, _slabs(*whole))
                offset += placed[whole] - whole[1]
            _refer(tensor, file.name, offset, length)
        check_places(model, source, folder)
    return "."


def drop_unused(models: list[onnx.ModelProto], folder: Path, added: Collection[str]) -> None:
    """Removes files of weights that passes added and later ones made anew, such as merged ones that were then quantised."""
    used = {(folder / location).absolute() for location in _locations(models)}
    for file in {Path(location) for location in added} - used:
        if file.parent == folder.absolute():
            file.unlink(missing_ok=True)


def under_one_root(model: onnx.ModelProto, root: Path, added: Collection[str]) -> Path:
    """The folder above all weights of the model, to which its references, to files that passes `added` or under `root`,
    become relative."""
    locations = _locations([model])
    if not locations & set(added):
        return root
    paths = {location: os.path.abspath(root / location) for location in locations}
    common = Path(os.path.commonpath([os.path.dirname(path) for path in paths.values()]))
    for tensor, reference in references(model):
        _, offset, length = _place(root, tensor)
        _refer(tensor, os.path.relpath(paths[reference["location"]], common), offset, length)
    return common


def _locations(models: list[onnx.ModelProto]) -> set[str]:
    return {reference["location"] for model in models for _, reference in references(model)}


def _wholes(places: set[Place]) -> dict[Place, Place]:
    """For each place the widest that holds it: of two graphs one may refer to neighbours as one weight."""
    wholes, widest = {}, (Path(), 0, 0)
    for path, offset, length in sorted(places, key=lambda place: (place[0], place[1], -place[2])):
        if path != widest[0] or offset + length > widest[1] + widest[2]:
            widest = (path, offset, length)
        wholes[path, offset, length] = widest
    return wholes


def _place(root: Path, tensor: TensorProto) -> Place:
    place = onnx.external_data_helper.ExternalDataInfo(tensor)
    length = place.length or tensor_bytes(tensor)
    return root / place.location, place.offset or 0, length


def _refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("external_data")
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _append(path: Path, slabs: Iterator[np.ndarray]) -> tuple[int, int]:
    """Writes the slabs at the end of a file; returns their offset and length."""
    with open(path, "ab") as file:
        file.write(bytes(-file.tell() % ALIGNMENT))
        offset = file.tell()
        for slab in slabs:
            slab.tofile(file)
        return offset, file.tell() - offset


def _slabs(path: Path, offset: int, length: int) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        file.seek(offset)
        for start in range(0, length, SLAB):
            yield np.frombuffer(file.read(min(SLAB, length - start)), np.uint8)


def transposed(rows: np.ndarray) -> Iterator[np.ndarray]:
    """[N, M] as slabs of [M, N]."""
    step = max(SLAB // len(rows), 1)
    for start in range(0, rows.shape[1], step):
        yield np.ascontiguousarray(rows[:, start : start + step].T)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Bytes [..., M] as the two numbers that each holds, the low one first: [..., 2 M]."""
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def packed_nibbles(values: np.ndarray) -> np.ndarray:
    """Numbers of 4 bits, an even count of them, two to a byte: uint8 [count / 2]."""
    flat = values.reshape(-1)
    return flat[0::2] | (flat[1::2] << 4)
