"""Inputs for a graph of which nothing is known but its signature.

Language models get sensible ones: tokens below the vocabulary's size, positions that follow what is in the cache,
caches full of noise (so that a graph that looks at a slot which nobody wrote shows it), masks that are causal.
Other graphs get normal noise, indices and masks as far as the graph shows that an input is one, and else 0 or 1.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from suture.core import axes
from suture.core.additive_mask import hiding
from suture.core.arrays import read_npz
from suture.core.cpm_inputs import made_up
from suture.core.errors import UserError
from suture.core.network.validity import Use, uses_of_inputs
from suture.core.shapes import ShapeRange, check_shapes
from suture.core.signature import Signature, find_signature
from suture.core.step_inputs import mask_values, positions_of, step_values

ROWS, LENGTH, SIDE = 2, 8, 32  # of dimensions whose length the graph leaves open
COUNT = 3  # of iterations
ANY_VOCABULARY = 100


@dataclass(frozen=True)
class Feeds:
    name: str
    values: dict[str, np.ndarray]
    even: bool = True  # whether dimensions of different names are as long as each other


def make_feeds(
    model: onnx.ModelProto,
    seed: int = 0,
    shapes: dict[str, ShapeRange] | None = None,
    name: object = "graph",
    rows: int = ROWS,
    length: int = LENGTH,
    apart: int = 0,
) -> list[Feeds]:
    """Several sets of inputs: prompt, later chunk at ragged places and decode for a language model, else one of noise; or
    one for each shape that `shapes` gives. Open dimensions without one have `rows` in front, `length` elsewhere, and each
    further name `apart` more.

    Raises UserError where the shapes do not fit the graph, which it calls `name`."""
    rng = np.random.default_rng(seed)
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initializers]
    _refuse_untyped(name, inputs)
    if shapes:
        check_shapes(name, inputs, shapes)
        uses = uses_of_inputs(model)
        kinds = dict.fromkeys(kind for given in shapes.values() for kind in given.different)
        return [Feeds(_title(kind, kinds), _noise(inputs, rng, uses, _chosen(shapes, kind), rows, length)) for kind in kinds]
    try:
        signature = find_signature(model)
    except UserError:
        signature = None
    made = [] if signature is None else _steps(model, signature, inputs, rng)
    return made or [Feeds("random inputs", _noise(inputs, rng, uses_of_inputs(model), None, rows, length, apart))]


def switched(feeds: Feeds) -> list[Feeds]:
    """The same with each input of one truth value the other way, which an If or a Loop goes by; none where there is none."""
    flags = {name: ~value for name, value in feeds.values.items() if value.dtype == bool and value.size == 1}
    said = ", ".join(f"{name} {str(bool(value.item())).lower()}" for name, value in flags.items())
    return [Feeds(f"{feeds.name}, {said}", feeds.values | flags, feeds.even)] if flags else []


def _steps(model: onnx.ModelProto, signature: Signature, inputs, rng) -> list[Feeds]:
    """Those steps that the graph's fixed lengths allow."""
    room = signature.capacity or 24
    steps = [("prompt", 0, min(8, room)), ("chunk", room // 3, min(4, room // 3)), ("decode", room // 2, 1)]
    found = []
    for name, past, tokens in steps:
        if tokens > 0:
            values = _step(model, signature, inputs, past, tokens, rng)
            if all(_fits(_sizes(value), values[value.name].shape) for value in inputs):
                found.append(Feeds(name, values))
    return found


def _fits(sizes: list[int | str], shape: tuple[int, ...]) -> bool:
    return len(sizes) == len(shape) and all(not isinstance(size, int) or size == given for size, given in zip(sizes, shape))


def make_noise(model: onnx.ModelProto, seed: int, below: dict[str, int]) -> dict[str, np.ndarray]:
    """One set of inputs of a graph that is not a decoder. `below`: by input, what its integers lie
    below, where the graph itself may not show it."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initializers]
    uses = uses_of_inputs(model) | {name: Use(below=bound) for name, bound in below.items()}
    return _noise(inputs, np.random.default_rng(seed), uses)


def read_feeds(path: Path) -> list[Feeds]:
    """Inputs from a file of numpy arrays by name (.npz)."""
    return [Feeds(path.name, read_npz(path, ".npz file of inputs", "write one with numpy.savez(path, name=array, ...)"))]


NUMBERS = "biuf"  # kinds of numpy's own dtypes


def check_feeds(path: Path, model: onnx.ModelProto, feeds: Feeds) -> None:
    """Raises UserError where the inputs in the file `path` are not those of the graph."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in initializers}
    remedy = f"write one array for each of {', '.join(inputs)}"
    if missing := inputs.keys() - feeds.values.keys():
        raise UserError(path, f"has no array for the input {min(missing)}", remedy)
    for name, value in inputs.items():
        given, sizes, dtype = feeds.values[name], _sizes(value), _dtype(value)
        fits = not value.type.tensor_type.HasField("shape") or _fits(sizes, given.shape)
        if not fits or given.dtype.kind not in NUMBERS or (dtype.kind in NUMBERS and dtype != given.dtype):
            raise UserError(path, f"{name} is {given.dtype} {list(given.shape)}, and the graph takes {dtype} {sizes}", remedy)


def _step(model, signature: Signature, inputs, past: int, tokens: int, rng) -> dict[str, np.ndarray]:
    """One step of `tokens` tokens after `past`; in a static cache the rows stand at different places."""
    rows = _rows(signature, inputs)
    starts = np.full(rows, past)
    if signature.static and past:
        starts = past - np.arange(rows)
    counts = np.full(rows, tokens)
    ids = rng.integers(0, signature.vocabulary or ANY_VOCABULARY, (rows, tokens))
    known = step_values(signature, ids, positions_of(starts, counts, tokens), 1 + 2 * np.arange(rows), starts, counts)
    known |= made_up(signature.layout, rows, signature.capacity)
    feeds = {}
    for value in inputs:
        name, dtype, sizes = value.name, _dtype(value), _sizes(value)
        if name in known:
            array = known[name]
        elif name == signature.mask:
            array = mask_values(value.type.tensor_type, signature, starts, counts)
        elif any(name == cache.past for cache in signature.caches):
            shape = [rows, sizes[1], signature.capacity if signature.static else past, sizes[3]]
            array = rng.standard_normal([size if isinstance(size, int) else rows for size in shape])
        else:
            array = _noise([value], rng, uses_of_inputs(model), rows=rows)[name]
        feeds[name] = np.ascontiguousarray(array).astype(dtype)
    return feeds


def _rows(signature: Signature, inputs) -> int:
    """The batch that an input of known meaning fixes; ROWS where none does."""
    places = dict.fromkeys(signature.inputs, 0)
    if signature.position_rows is not None and signature.positions is not None:
        places[signature.positions] = 1
    sizes = (_sizes(value)[places[value.name]] for value in inputs if value.name in places and _sizes(value))
    return next((size for size in sizes if isinstance(size, int)), ROWS)


def _title(kind: str, kinds: dict) -> str:
    return f"random inputs, {kind} shapes" if len(kinds) > 1 else "random inputs"


def _chosen(shapes: dict[str, ShapeRange], kind: str) -> dict[str, tuple[int, ...]]:
    return {name: given.different.get(kind, given.optimum) for name, given in shapes.items()}


def _refuse_untyped(name: object, inputs) -> None:
    for value in inputs:
        if not value.type.HasField("tensor_type"):
            raise UserError(name, f"input {value.name} is not a tensor", "give one that takes tensors")
        if not value.type.tensor_type.HasField("shape"):
            raise UserError(name, f"input {value.name} has no shape", "write its shape into the graph")
        if value.type.tensor_type.elem_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
            raise UserError(name, f"input {value.name} holds no numbers", "give one that takes numbers")


def _noise(
    inputs,
    rng,
    uses: dict[str, Use] | None = None,
    given: dict[str, tuple] | None = None,
    rows: int = ROWS,
    length: int = LENGTH,
    apart: int = 0,
) -> dict[str, np.ndarray]:
    """A dimension's name means one length everywhere: what a given shape says, else a usual one for its place, or what follows
    from others (suture.core.axes)."""
    uses, given = uses or {}, given or {}
    lengths: dict[str, int] = {}
    for value in inputs:
        for size, chosen in zip(_sizes(value), given.get(value.name, ())):
            if isinstance(size, str) and size:
                lengths.setdefault(size, chosen)
                lengths.setdefault(*(axes.solved(size, chosen) or (size, chosen)))
    feeds, names = {}, open_lengths(inputs)
    for value in inputs:
        sizes = _sizes(value)
        more = [apart * names.index(size) if size in names else 0 for size in sizes]
        shape = given.get(value.name) or [
            size if isinstance(size, int) else _length(size, max(_usual(axis, len(sizes), rows, length) + further, 1), lengths)
            for axis, (size, further) in enumerate(zip(sizes, more))
        ]
        feeds[value.name] = np.asarray(_values(value, shape, uses.get(value.name, Use()), rng)).astype(_dtype(value))
    return feeds


def open_lengths(inputs) -> list[str]:
    """The names of open dimensions that are no batch, in the order in which they are met."""
    named = [[size for size in _sizes(value) if isinstance(size, str) and size] for value in inputs]
    batches = {_sizes(value)[0] for value in inputs if _sizes(value)}
    return list(dict.fromkeys(size for sizes in named for size in sizes if size not in batches and axes.names(size) == [size]))


def _usual(axis: int, rank: int, rows: int, length: int) -> int:
    """Rows in front; of pictures three channels of 32 by 32; else 8."""
    if axis == 0:
        return rows
    return {1: 3}.get(axis, SIDE) if rank == 4 else length


def _length(name: str, usual: int, lengths: dict[str, int]) -> int:
    if not name:
        return usual
    known = axes.length(name, lengths)
    if known is None:
        other, size = axes.solved(name, usual) or (name, usual)
        lengths.setdefault(other, max(size, 1))
        known = axes.length(name, lengths)
    return lengths.setdefault(name, usual if known is None else known)


def _values(value: onnx.ValueInfoProto, shape, use: Use, rng) -> np.ndarray:
    kind = _dtype(value).kind
    if use.mask and shape:
        return _seen(shape)
    if use.hides and shape:
        return 1 - _seen(shape)
    if use.additive and shape:
        return hiding(_seen(shape), value.type.tensor_type.elem_type)
    if kind == "b":
        return rng.random(shape) < 0.7
    if kind in "iu":
        if use.count:
            return np.full(shape, COUNT)
        return rng.integers(0, 2 if use.below is None else max(use.below, 1), shape)
    return rng.standard_normal(shape)


def _seen(shape) -> np.ndarray:
    """1 where a row may look: all of its places but, of every other row, the last quarter."""
    seen = np.ones(shape)
    hidden = shape[-1] // 4
    if hidden and len(shape) > 1:
        seen[1::2, ..., shape[-1] - hidden :] = 0
    return seen


def _sizes(value: onnx.ValueInfoProto) -> list[int | str]:
    """A number, a name, or "" for a dimension of which nothing is said (some exporters write -1)."""
    return [
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else dim.dim_param
        for dim in value.type.tensor_type.shape.dim
    ]


def _dtype(value: onnx.ValueInfoProto) -> np.dtype:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
