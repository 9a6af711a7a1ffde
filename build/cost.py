"""What a decode step must move through memory, kernel by kernel, against the least that any engine would have to.

Everything is counted for one sequence and one token (B = S = 1) with the cache full, where the kernels' dynamic
dimensions are all 1. A kernel moves what it reads, its constants and what it writes, each once; nothing is assumed to
stay in the GPU's own caches between two kernels. Exceptions, which move less than their tensors' sizes:

    a cache updated in place     one slot of it is written, nothing is read
    rows gathered from a table   one row a token (embedding, rotary tables)
    parts of one tensor          no more than the whole of it

The floor: every weight read once (of gathered tables one row), the caches read once, the logits written once.

Of a graph without a KV cache everything is counted for one run at its shapes, which must be fixed but for the batch, of
which one is counted. Its floor: weights and inputs read once, outputs written once. What runs between jumps (If, Loop) has
bytes a kernel, and no sum.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

import onnx

from suture.core.dtypes import BY_TENSORRT
from suture.core.findings import Finding
from suture.core.network.advice import LOWER
from suture.core.signature import Signature
from suture.core.tensors import stored_size
from suture.core.weights import streamed_bytes

ALIASES = {"FP8": ("fp8e4m3",), "FP4": ("fp4e2m1",)}
# As the builder's log calls them, in bytes an element.
BYTES = {
    name: each.bytes
    for each in BY_TENSORRT.values()
    for name in (each.tensorrt.lower(), each.numpy, *ALIASES.get(each.tensorrt, ()))
}
GATHERS = re.compile(r"Gath|gather", re.ASCII)
MOVES_ONLY = re.compile(r"__myl_(?:Resh|Tran|Move|Slic|Sque|Unsq)+_myl")
KINDS = ("weights", "cache", "other")
LAYER = re.compile(r"\b(?:h|layers?|blocks?)[._](\d+)\b")


@dataclass(frozen=True)
class CountedGraph:
    """What the counting needs to know of the ONNX graph that an engine was built from."""

    static: bool  # its cache has a fixed capacity; otherwise a dynamic dimension may be more than 1
    caches: frozenset[str]  # inputs and outputs
    weights: frozenset[str]  # that are inputs of the engine
    layers: dict[str, int] = field(repr=False)  # by ONNX node
    floor: int | None
    decoder: bool = True
    shared: bool = True  # products share an input, so merging their weights may spare a copy


def describe_graph(proto: onnx.ModelProto, signature: Signature | None, bound: frozenset[str] = frozenset()) -> CountedGraph:
    """`bound`: names of the weights that are inputs of the engine. The signature of a decoder, or None."""
    caches = {name for cache in signature.caches for name in (cache.past, cache.present)} if signature else set()
    layers = {node.name: layer for node in proto.graph.node if (layer := _layer(node)) is not None}
    fixed = _fixed_slots(proto, signature) if signature else _fixed_but_batch(proto)
    floor = (floor_bytes(proto, signature) if signature else _floor_of_a_run(proto)) if fixed else None
    return CountedGraph(fixed, frozenset(caches), bound, layers, floor, signature is not None, _products_share(proto))


def floor_bytes(proto: onnx.ModelProto, signature: Signature) -> int:
    """Bytes that a decode step (B = S = 1, caches full) of any engine for this graph moves at least."""
    values = {value.name: value.type.tensor_type for value in (*proto.graph.input, *proto.graph.output)}
    ends = [*(cache.past for cache in signature.caches), signature.logits]
    return streamed_bytes(proto) + math.ceil(sum(_one_step(values[name]) for name in ends))


def add_cost(profile: dict, graph: CountedGraph) -> list[Finding]:
    """Adds to each kernel of one profile's list (suture.build.kernels) its `layer` and `bytes` (weights, cache, other), and to
    the list `kernels_by_layer`, `kernels_outside_layers`, `decode_bytes` by kind, `copied_bytes` (reading and writing
    copies of weights and caches) and `floor_bytes`; None where the shapes do not say.

    Returns findings: kernels that write a copy of a weight or a cache, whatever the copy's layout, at each step.
    """
    kernels = [entry for entry in profile["entries"] if entry["kernel"]]
    sizes = TensorSizes(profile["entries"])
    last = None
    for entry in kernels:
        named = [layer for node in entry["onnx_nodes"] if (layer := _layer_named(node, graph)) is not None]
        last = entry["layer"] = max(named) if named else (None if entry["onnx_nodes"] else last)
        entry["bytes"] = _moved(entry, sizes, graph) if graph.static else None
    by_layer = Counter(entry["layer"] for entry in kernels)
    profile["kernels_by_layer"] = {str(layer): by_layer[layer] for layer in sorted(by_layer.keys() - {None})}
    profile["kernels_outside_layers"] = by_layer[None]
    profile["floor_bytes"] = graph.floor
    profile["decode_bytes"] = profile["copied_bytes"] = None
    if not kernels or profile.get("jumps") or any(entry["bytes"] is None for entry in kernels):
        return []
    profile["decode_bytes"] = {kind: sum(entry["bytes"][kind] for entry in kernels) for kind in KINDS}
    copies = [(entry, tensor) for entry in kernels for tensor in _copied(entry, sizes, graph)]
    profile["copied_bytes"] = sum(sum(entry["bytes"].values()) for entry in {id(entry): entry for entry, _ in copies}.values())
    return [_finding(profile["profile"], what, found, graph) for what in ("weight", "cache")
            if (found := [(entry, tensor) for entry, tensor in copies if (tensor["name"] in graph.caches) == (what == "cache")])]  # fmt: skip


def over_floor(profile: dict) -> float | None:
    """Bytes of a decode step as a multiple of the floor, of a list that add_cost has seen."""
    moved, floor = profile["decode_bytes"], profile["floor_bytes"]
    return sum(moved.values()) / floor if moved and floor else None


def kernels_a_layer(profile: dict) -> str:
    """ "9", or "9 to 11": the first layer's and the last one's kernels also do what comes before and after all layers."""
    counts = profile["kernels_by_layer"].values()
    return " to ".join(str(count) for count in sorted({min(counts, default=0), max(counts, default=0)}))


class TensorSizes:
    """Bytes of the kernels' tensors at B = S = 1, where a dynamic dimension is 1, or the number of heads where a kernel
    has joined it with the batch: the list shows only the -1 of both, but what is merely moved keeps its size."""

    def __init__(self, entries: list[dict]):
        self.heads: dict[str, float] = {}
        self.whole: dict[str, float] = {}  # as its maker declares a tensor; kernels that read parts declare only those
        for entry in entries:
            if any(tensor["dtype"] not in BYTES for tensor in (*entry["inputs"], *entry["outputs"])):
                continue
            if MOVES_ONLY.match(entry["name"]) and len(entry["inputs"]) == len(entry["outputs"]) == 1:
                read, written = self.of(entry["inputs"][0]), self.of(entry["outputs"][0])
                if -1 in entry["outputs"][0]["shape"] and read > written:
                    self.heads[entry["outputs"][0]["name"]] = read / written
            for tensor in entry["outputs"]:
                self.whole[tensor["name"]] = max(self.whole.get(tensor["name"], 0), self.of(tensor))

    def of(self, tensor: dict) -> float:
        return _elements(tensor) * BYTES[tensor["dtype"]] * self.heads.get(tensor["name"], 1)

    def row(self, tensor: dict) -> float:
        return self.of(tensor) / max(tensor["shape"][0], 1) if len(tensor["shape"]) > 1 else self.of(tensor)

    def slot(self, cache: dict) -> float:
        """Of [B,kv_heads,L,head_dim]."""
        return self.of(cache) / cache["shape"][-2]


def _moved(entry: dict, sizes: TensorSizes, graph: CountedGraph) -> dict[str, int] | None:
    if any(tensor["dtype"] not in BYTES for tensor in (*entry["inputs"], *entry["constants"], *entry["outputs"])):
        return None
    gathers, in_place = bool(GATHERS.search(entry["name"])), _in_place(entry, graph)
    moved = Counter(dict.fromkeys(KINDS, 0))
    reads, writes = Counter(), Counter()
    for tensor in entry["inputs"]:
        if tensor["name"] not in in_place:
            reads[tensor["name"]] += sizes.row(tensor) if gathers and tensor["name"] in graph.weights else sizes.of(tensor)
    for tensor in entry["outputs"]:
        writes[tensor["name"]] += sizes.slot(tensor) if tensor["name"] in in_place else sizes.of(tensor)
    for tensor in entry["constants"]:
        moved["weights"] += sizes.row(tensor) if gathers else sizes.of(tensor)
    for counted in (reads, writes):
        for name, size in counted.items():
            moved[_kind(name, graph)] += min(size, sizes.whole.get(name, size))
    return {kind: math.ceil(size) for kind, size in moved.items()}


def _copied(entry: dict, sizes: TensorSizes, graph: CountedGraph) -> list[dict]:
    """The weights and caches that a kernel copies. At B = S = 1 what a layer computes is far smaller than its matrices
    and caches: a kernel that reads one of them whole and writes as much has moved it."""
    if not graph.decoder and not MOVES_ONLY.match(entry["name"]):
        return []  # what it computes may be as large as its weights
    outputs = [tensor for tensor in entry["outputs"] if tensor["name"] not in _in_place(entry, graph)]
    written = max((sizes.of(tensor) / BYTES[tensor["dtype"]] for tensor in outputs), default=0)
    sources = [
        tensor for tensor in entry["inputs"] if tensor["name"] in graph.caches and tensor["name"] not in _in_place(entry, graph)
    ]
    if not GATHERS.search(entry["name"]):
        sources += [*entry["constants"], *(tensor for tensor in entry["inputs"] if tensor["name"] in graph.weights)]
    unique = {tensor["name"]: tensor for tensor in sources}.values()
    return [tensor for tensor in unique if sum(size > 1 for size in tensor["shape"]) > 1 and written >= _elements(tensor)]


def _finding(profile: str, what: str, found: list[tuple[dict, dict]], graph: CountedGraph) -> Finding:
    entry, tensor = found[0]
    size = sum(_elements(tensor) * BYTES[tensor["dtype"]] for _, tensor in found) / 1e6
    nodes = ", ".join(entry["onnx_nodes"][:2]) or "no ONNX node"
    often, first = "step" if graph.decoder else "run", f"the first is {entry['name']} ({nodes}) of {tensor['name']}"
    said = f"{len(found)} kernels copy {what}s, {size:,.1f} MB a {often}; {first}"
    merge = "run surgery --merge qkv gate-up" if graph.shared and graph.decoder else "TensorRT wants another layout of them"
    remedy = {
        "weight": "take --weights constant" if graph.weights else merge,
        "prompt": "decoding has a profile of its own without them",
        "any": "take --profiles two, so that decoding has a profile of its own",
    }.get("weight" if what == "weight" else profile, LOWER)
    nothing = what == "weight" and not graph.weights and not (graph.shared and graph.decoder)
    severity = "note" if nothing or (profile == "prompt" and what == "cache") else "warning"
    return Finding(severity, f"profile {profile}", said, remedy)


def _in_place(entry: dict, graph: CountedGraph) -> set[str]:
    return {tensor["name"] for tensor in entry["inputs"]} & {tensor["name"] for tensor in entry["outputs"]} & graph.caches


def _kind(name: str, graph: CountedGraph) -> str:
    return "weights" if name in graph.weights else "cache" if name in graph.caches else "other"


def _elements(tensor: dict) -> int:
    return math.prod(max(size, 1) for size in tensor["shape"])


def _layer(node: onnx.NodeProto) -> int | None:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
    match = LAYER.search(node.name) or LAYER.search(scopes)
    return int(match[1]) if match else None


def _layer_named(node: str, graph: CountedGraph) -> int | None:
    if node in graph.layers:
        return graph.layers[node]
    match = LAYER.search(node)  # the parser appends numbers to names that it has used before
    return int(match[1]) if match else None


def _fixed_slots(proto: onnx.ModelProto, signature: Signature) -> bool:
    pasts = {cache.past for cache in signature.caches}
    shapes = [value.type.tensor_type.shape.dim for value in proto.graph.input if value.name in pasts]
    return all(dims[2].HasField("dim_value") for dims in shapes)


def _fixed_but_batch(proto: onnx.ModelProto) -> bool:
    dims = (dim for value in proto.graph.input for dim in value.type.tensor_type.shape.dim[1:])
    return all(dim.HasField("dim_value") for dim in dims)


def _floor_of_a_run(proto: onnx.ModelProto) -> int | None:
    """Without a cache, for one of the batch; None where an output's shape is not known."""
    ends = [value.type.tensor_type for value in (*proto.graph.input, *proto.graph.output)]
    known = all(end.HasField("shape") and all(dim.HasField("dim_value") for dim in end.shape.dim[1:]) for end in ends)
    return streamed_bytes(proto) + math.ceil(sum(map(_one_step, ends))) if known else None


def _products_share(proto: onnx.ModelProto) -> bool:
    """Whether an input goes into several products with constant weights."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    read = [node.input[0] for node in proto.graph.node if node.op_type in ("Gemm", "MatMul") and node.input[1] in weights]
    return len(set(read)) < len(read)


def _one_step(value: onnx.TypeProto.Tensor) -> float:
    return math.prod(max(dim.dim_value, 1) for dim in value.shape.dim) * stored_size(value.elem_type)
