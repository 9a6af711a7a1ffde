"""One rank of a graph that surgery divided, in onnxruntime: the graph cut at its collectives, and torch's all-reduce between.

onnxruntime has no collectives. So this proves that the ranks' graphs are right together, on CPUs and on GPUs; what it computes is
not expected to be fast, for each of the two sums of a layer ends one session's run and begins another.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from onnx import shape_inference

from suture.core.dtypes import BY_ORT, torch_dtype
from suture.core.errors import UserError
from suture.core.sessions import CPU, new_session
from suture.core.shadow_copy import runnable
from suture.core.signature import find_signature
from suture.core.weights import load_graph, weights_root
from suture.runtime.decoders import OfSignature, StaticDecoder
from suture.runtime.io_binding import Binding, Feed, as_tensor

COLLECTIVE = "DistCollective"
AllReduce = Callable[[torch.Tensor], object]  # adds up, in place, what all ranks give it in the same order
CUDA = "CUDAExecutionProvider"


@dataclass
class Segment:
    """What a rank computes between two collectives. `sums`: those of its outputs that are added up over ranks behind it."""

    model: onnx.ModelProto
    sums: list[str] = field(default_factory=list)


def segments(model: onnx.ModelProto) -> list[Segment]:
    """Cuts a rank's graph: each node runs as early as its inputs are there. A sum's result has its input's place in memory."""
    inferred = shape_inference.infer_shapes(model)
    graph = inferred.graph
    given = {tensor.name for tensor in graph.initializer}
    level = dict.fromkeys([*given, *(value.name for value in graph.input)], 0)
    nodes: list[list[onnx.NodeProto]] = [[]]
    summed: list[list[str]] = [[]]
    same: dict[str, str] = {}
    for node in graph.node:
        names = [same.get(name, name) for name in node.input if name]
        at = max((level[name] for name in node.input if name), default=0)
        if node.op_type == COLLECTIVE:
            same[node.output[0]] = names[0]
            level[node.output[0]] = at + 1
            summed[at].append(names[0])
        else:
            nodes[at].append(_reading(node, same))
            level |= dict.fromkeys(node.output, at)
        while len(nodes) <= max(level[name] for name in node.output if name):
            nodes.append([])
            summed.append([])
    types = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    return [Segment(_part(inferred, nodes, index, types), sums) for index, sums in enumerate(summed)]


def _reading(node: onnx.NodeProto, same: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [same.get(name, name) for name in node.input]
    return copy


def _part(model: onnx.ModelProto, nodes: list[list[onnx.NodeProto]], index: int, types: dict) -> onnx.ModelProto:
    """The segment's nodes, with what it takes from earlier ones and gives to later ones as inputs and outputs."""
    ends = {value.name for value in model.graph.output}
    made = {name for node in nodes[index] for name in node.output if name}
    read = {name for node in nodes[index] for name in node.input if name}
    later = {name for other in nodes[index + 1 :] for node in other for name in node.input}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in read]
    inputs = sorted(read - made - {tensor.name for tensor in weights})
    outputs = [
        name for name in dict.fromkeys(name for node in nodes[index] for name in node.output) if name in made & (ends | later)
    ]
    graph = onnx.GraphProto(name=f"segment_{index}", node=nodes[index], initializer=weights)
    graph.input.extend(types[name] for name in inputs)
    graph.output.extend(types[name] for name in outputs)
    part = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    part.opset_import.extend(each for each in model.opset_import if each.domain == "")
    return part


@dataclass(frozen=True)
class RankModel(OfSignature):
    """The graph of one rank; `decoder` is stepped by every rank at the same time, with the same tokens."""

    parts: list[Segment] = field(repr=False)
    sessions: list[ort.InferenceSession] = field(repr=False)
    all_reduce: AllReduce = field(repr=False)
    device: str = "cpu"

    def decoder(self, batch: int, noise: bool = False) -> StaticDecoder:
        return StaticDecoder(RankSession(self, batch), self.signature, noise)


def open_rank(path: Path, all_reduce: AllReduce, device: str = "cpu") -> RankModel:
    """The portable graph of a rank, such as DIR/rank0.onnx. `all_reduce`: torch.distributed's, or another that adds up in place.
    bfloat16 is computed in float32 on a CPU. Raises UserError for a graph without collectives, or with a growing cache."""
    graph = load_graph(path)
    if not any(node.op_type == COLLECTIVE for node in graph.graph.node):
        raise UserError(path, "has no collectives", "give one that `surgery ranks` wrote")
    signature = find_signature(graph, path)
    if not signature.static:
        raise UserError(path, "has a cache that grows", "run surgery without --cache growing first")
    parts = segments(runnable(graph) if device == "cpu" else graph)
    providers = [CPU] if device == "cpu" else [CUDA, CPU]
    sessions = [new_session(part.model, weights_root(path), providers=providers) for part in parts]
    return RankModel(path.stem, signature, parts, sessions, all_reduce, device)


class RankSession:
    """A batch of sequences on one rank; a suture.runtime.decoders.DecoderSession."""

    all_at_once = False

    def __init__(self, model: RankModel, batch: int):
        self.model, self.batch = model, batch
        declared = {value.name: value for session in model.sessions for value in session.get_inputs()}
        self.types = {name: torch_dtype(BY_ORT[value.type]) for name, value in declared.items()}

        def empty(name: str) -> torch.Tensor:
            return torch.zeros((batch, *declared[name].shape[1:]), dtype=self.types[name], device=model.device)

        self.caches = {cache.past: empty(cache.past) for cache in model.signature.caches}
        constant = (*(cache.past for cache in model.signature.encoder_caches), *model.signature.layout)
        self.crossed = {name: empty(name) for name in constant if name in declared}
        self.steps: dict[tuple[int, int, int], RankStep] = {}  # by width and rows

    def advance(self, feeds: dict[str, Feed], rows: slice = slice(None)) -> torch.Tensor:
        key = feeds[self.model.signature.tokens].shape[1], *rows.indices(self.batch)[:2]
        if key not in self.steps:
            for other in [other for other in self.steps if other[0] > 1]:
                del self.steps[other]
            self.steps[key] = RankStep(self, feeds, rows)
        return self.steps[key].run(feeds)


class RankStep:
    """A step of one width for some rows: every tensor that crosses a collective has a place of its own."""

    def __init__(self, session: RankSession, feeds: dict[str, Feed], rows: slice):
        self.model = session.model
        self.memory: dict[str, torch.Tensor] = {}
        self.fed = [name for name in feeds if name in session.types]
        presents = {}
        for cache in self.model.signature.caches:
            self.memory[cache.past] = presents[cache.present] = session.caches[cache.past][rows]
        self.memory |= {name: values[rows] for name, values in session.crossed.items()}
        self.bindings = []
        for part, each in zip(self.model.parts, self.model.sessions):
            binding = Binding(each)
            for value in each.get_inputs():
                if value.name in self.fed and value.name not in self.memory:
                    shape, dtype = feeds[value.name].shape, session.types[value.name]
                    self.memory[value.name] = torch.empty(shape, dtype=dtype, device=binding.device(value.name))
                    self.memory[value.name].copy_(as_tensor(feeds[value.name]))
                binding.input(value.name, self.memory[value.name])
            self._bind_outputs(binding, each, presents)
            self.bindings.append((binding, part.sums))

    def _bind_outputs(self, binding: Binding, session: ort.InferenceSession, presents: dict[str, torch.Tensor]) -> None:
        """What onnxruntime says of the shapes that come out once: most depend on the step's rows and width."""
        shapes = _shapes(binding, session, presents)
        for value in session.get_outputs():
            if value.name not in presents:
                dtype = torch_dtype(BY_ORT[value.type])
                whole_numbers = value.type == "tensor(int64)"  # shape arithmetic, which is done on the CPU
                device = "cpu" if whole_numbers else self.model.device
                self.memory[value.name] = torch.empty(shapes[value.name], dtype=dtype, device=device)
            binding.output(value.name, presents.get(value.name, self.memory.get(value.name)))
        binding.run()  # the next segment's shapes may depend on what is in its inputs

    def run(self, feeds: dict[str, Feed]) -> torch.Tensor:
        for name in self.fed:
            self.memory[name].copy_(as_tensor(feeds[name]))
        for binding, sums in self.bindings:
            binding.run()
            for name in sums:
                self.model.all_reduce(self.memory[name])
        return self.memory[self.model.signature.logits]


def _shapes(binding: Binding, session: ort.InferenceSession, presents: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Of a run whose results are dropped, but for what it writes into caches, which the next run writes again."""
    for value in session.get_outputs():
        if value.name in presents:
            binding.output(value.name, presents[value.name])
        else:
            binding.binding.bind_output(value.name)
    binding.run()
    return {value.name: tuple(found.shape()) for value, found in zip(session.get_outputs(), binding.binding.get_outputs())}
