"""One rank of a graph that surgery divided, in onnxruntime: the graph cut at its collectives, and torch's all-reduce between.

onnxruntime has no collectives, so each of the two sums of a layer ends one session's run and begins another's. On a GPU all of
them compute on one stream of torch's, in order, so that nothing waits on the host, and a step of a fixed size is captured as one
CUDA graph, its collectives with it. A rank's process sees one GPU: CUDA_VISIBLE_DEVICES is set before CUDA is loaded.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from onnx import shape_inference

from suture.core.dtypes import BY_ONNX, BY_ORT, torch_dtype
from suture.core.errors import UserError
from suture.core.sessions import new_session
from suture.core.shadow_copy import runnable
from suture.core.signature import find_signature
from suture.core.weights import load_graph, weights_root
from suture.runtime.decoders import OfSignature, StaticDecoder
from suture.runtime.graphs import cuda_session
from suture.runtime.io_binding import Binding, Feed, as_tensor

COLLECTIVE = "DistCollective"
WARM = 3  # steps before one is captured: kernels are chosen, memory is there, NCCL has its channels
AllReduce = Callable[[torch.Tensor], object]  # adds up, in place, what all ranks give it in the same order


@dataclass
class Segment:
    """What a rank computes between two collectives. `sums`: those of its outputs that are added up over ranks behind it."""

    model: onnx.ModelProto
    sums: list[str] = field(default_factory=list)

    @functools.cached_property
    def values(self) -> set[str]:
        """The tensors whose values are read here, not their shapes alone."""
        return {name for node in self.model.graph.node if node.op_type != "Shape" for name in node.input}


def segments(model: onnx.ModelProto) -> list[Segment]:
    """Cuts a rank's graph: each node runs as early as its inputs are there. A sum's result has its input's place in memory.
    Arithmetic on the shapes of the graph's inputs crosses no cut: each segment that reads its result has it anew."""
    inferred = shape_inference.infer_shapes(model)
    graph = inferred.graph
    types = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    shape_nodes = _shape_nodes(graph, types)
    given = {tensor.name for tensor in graph.initializer}
    level = dict.fromkeys([*given, *(value.name for value in graph.input), *shape_nodes], 0)
    nodes: list[list[onnx.NodeProto]] = [[]]
    summed: list[list[str]] = [[]]
    same: dict[str, str] = {}
    for node in graph.node:
        if node.output[0] in shape_nodes:
            continue
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
    for each in nodes:
        each[:0] = _needed(each, shape_nodes)
    return [Segment(_part(inferred, nodes, index, types), sums) for index, sums in enumerate(summed)]


def _shape_nodes(graph: onnx.GraphProto, types: dict[str, onnx.ValueInfoProto]) -> dict[str, onnx.NodeProto]:
    """By output, in order: nodes that make an int64 scalar or vector of nothing but the shapes of the graph's inputs."""
    inputs, found = {value.name for value in graph.input}, {}
    known = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT64}
    for node in graph.node:
        reads = inputs if node.op_type == "Shape" else known | found.keys()
        small = (len(node.output) == 1 and node.output[0] in types) and types[node.output[0]].type.tensor_type
        if (
            small
            and small.elem_type == onnx.TensorProto.INT64
            and len(small.shape.dim) <= 1
            and {*filter(None, node.input)} <= reads
        ):
            found[node.output[0]] = node
    return found


def _needed(nodes: list[onnx.NodeProto], shape_nodes: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    wanted = {name for node in nodes for name in node.input}
    needed = []
    for name, node in reversed(shape_nodes.items()):
        if name in wanted:
            needed.insert(0, node)
            wanted |= set(node.input)
    return needed


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
    later = {name for other in nodes[index + 1 :] for name in _reads(other)}
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


def _reads(nodes: list[onnx.NodeProto]) -> set[str]:
    """What these nodes read and do not make themselves."""
    made = {name for node in nodes for name in node.output}
    return {name for node in nodes for name in node.input if name} - made


@dataclass(frozen=True)
class RankModel(OfSignature):
    """The graph of one rank; `decoder` is stepped by every rank at the same time, with the same tokens."""

    path: Path
    inputs: dict[str, onnx.ValueInfoProto] = field(repr=False)
    parts: list[Segment] = field(repr=False)
    all_reduce: AllReduce = field(repr=False)
    device: str = "cpu"  # or "cuda"
    fixed: tuple[int, ...] = ()  # widths of steps of all rows that have sessions of their own, of fixed sizes
    captured: bool = False  # whether these steps are captured as CUDA graphs
    stream: torch.cuda.Stream | None = None  # that a GPU computes on

    def decoder(self, batch: int, noise: bool = False) -> StaticDecoder:
        return StaticDecoder(RankSession(self, batch), self.signature, noise)

    def open(self, sizes: tuple[int, int] | None = None) -> list[ort.InferenceSession]:
        """A session a segment, for steps of any size, or of this batch and this many tokens alone."""
        root, name = weights_root(self.path), str(self.path)
        if self.device == "cuda":
            return [cuda_session(part.model, root, name, sizes, self.stream) for part in self.parts]
        named = dict(zip(("batch", "sequence"), sizes or ()))
        return [new_session(part.model, root, sizes=named) for part in self.parts]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within, torch computes where the sessions do, after what it was given to do before and before what follows."""
        if self.stream is None:
            yield
            return
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)


def open_rank(
    path: Path, all_reduce: AllReduce, device: str = "cpu", fixed: tuple[int, ...] | None = None, captured: bool = True
) -> RankModel:
    """The portable graph of a rank, such as DIR/rank0.onnx. `all_reduce`: torch.distributed's, or another that adds up in place.
    `fixed`: widths of steps that are captured on a GPU (default: there, that of one token), each with weights of its own; with
    `captured` false they are run as the others. bfloat16 is computed in float32 on a CPU. Raises UserError for a graph without
    collectives, or with a growing cache."""
    graph = load_graph(path)
    if not any(node.op_type == COLLECTIVE for node in graph.graph.node):
        raise UserError(path, "has no collectives", "give one that `surgery ranks` wrote")
    signature = find_signature(graph, path)
    if not signature.static:
        raise UserError(path, "has a cache that grows", "run surgery without --cache growing first")
    on_gpu = device == "cuda"
    graph = graph if on_gpu else runnable(graph)
    stream = torch.cuda.Stream() if on_gpu else None
    inputs = {value.name: value for value in graph.graph.input}
    widths = fixed if fixed is not None else (1,) if on_gpu else ()
    return RankModel(
        path.stem, signature, path, inputs, segments(graph), all_reduce, device, widths, captured and on_gpu, stream
    )


class RankSession:
    """A batch of sequences on one rank; a suture.runtime.decoders.DecoderSession."""

    all_at_once = False

    def __init__(self, model: RankModel, batch: int):
        self.model, self.batch = model, batch
        self.sessions: dict[tuple[int, int] | None, list[ort.InferenceSession]] = {}
        declared = {name: value.type.tensor_type for name, value in model.inputs.items()}
        self.types = {name: torch_dtype(BY_ONNX[value.elem_type]) for name, value in declared.items()}

        def empty(name: str) -> torch.Tensor:
            shape = [dim.dim_value for dim in declared[name].shape.dim]
            return torch.zeros((batch, *shape[1:]), dtype=self.types[name], device=model.device)

        self.caches = {cache.past: empty(cache.past) for cache in model.signature.caches}
        constant = (*(cache.past for cache in model.signature.encoder_caches), *model.signature.layout)
        self.crossed = {name: empty(name) for name in constant if name in declared}
        self.steps: dict[tuple[int, int, int], RankStep] = {}  # by width and rows

    def advance(self, feeds: dict[str, Feed], rows: slice = slice(None)) -> torch.Tensor:
        width, (first, end, _) = feeds[self.model.signature.tokens].shape[1], rows.indices(self.batch)
        key = width, first, end
        if key not in self.steps:
            for other in [other for other in self.steps if other[0] > 1]:
                del self.steps[other]
            fixed = width in self.model.fixed and end - first == self.batch
            self.steps[key] = RankStep(self, self._opened((self.batch, width) if fixed else None), feeds, rows, fixed)
        return self.steps[key].run(feeds)

    def _opened(self, sizes: tuple[int, int] | None) -> list[ort.InferenceSession]:
        if sizes not in self.sessions:
            self.sessions[sizes] = self.model.open(sizes)
        return self.sessions[sizes]


class RankStep:
    """A step of one width for some rows: every tensor that crosses a collective has a place of its own.

    On a GPU, where all of them lie there, the sessions and the collectives are queued one after the other and nothing waits on
    the host; where one lies on the CPU, each session waits for what came before it."""

    def __init__(
        self, session: RankSession, sessions: list[ort.InferenceSession], feeds: dict[str, Feed], rows: slice, fixed: bool
    ):
        self.model = session.model
        self.memory: dict[str, torch.Tensor] = {}
        self.fed = [name for name in feeds if name in session.types]
        self.graph: torch.cuda.CUDAGraph | None = None
        presents = {}
        for cache in self.model.signature.caches:
            self.memory[cache.past] = presents[cache.present] = session.caches[cache.past][rows]
        self.memory |= {name: values[rows] for name, values in session.crossed.items()}
        self.bindings = [(Binding(each), part.sums) for part, each in zip(self.model.parts, sessions)]
        for name in self.fed:
            place = self._place(name)
            self.memory[name] = torch.empty(feeds[name].shape, dtype=session.types[name], device=place)
            self.memory[name].copy_(as_tensor(feeds[name]))
        with self.model.computing():
            for binding, _ in self.bindings:
                for value in binding.session.get_inputs():
                    binding.input(value.name, self.memory[value.name])
                self._bind_outputs(binding, presents)
            self.ordered = self.model.stream is not None and all(tensor.is_cuda for tensor in self.memory.values())
            for binding, _ in self.bindings:
                binding.ordered = self.ordered
            if fixed and self.ordered and self.model.captured:
                self._capture()

    def _place(self, name: str) -> str:
        """Where a tensor is wanted: on the CPU as soon as one segment reads it there, as onnxruntime does arithmetic on shapes."""
        pairs = zip(self.model.parts, self.bindings)
        reading = [binding for part, (binding, _) in pairs if binding.takes(name) and name in part.values]
        places = {binding.device(name) for binding in reading}
        return self.model.device if len(places) == 0 else min(places)

    def _bind_outputs(self, binding: Binding, presents: dict[str, torch.Tensor]) -> None:
        """What onnxruntime says of the shapes that come out once: most depend on the step's rows and width."""
        shapes = _shapes(binding, presents)
        for value in binding.session.get_outputs():
            if value.name not in presents:
                dtype = torch_dtype(BY_ORT[value.type])
                self.memory[value.name] = torch.empty(shapes[value.name], dtype=dtype, device=self._place(value.name))
            binding.output(value.name, presents.get(value.name, self.memory.get(value.name)))
        binding.run()  # the next segment's shapes may depend on what is in its inputs

    def _capture(self) -> None:
        for _ in range(WARM):
            self._queue()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.model.stream, capture_error_mode="thread_local"):
            self._queue()

    def _queue(self) -> None:
        for binding, sums in self.bindings:
            binding.run()
            for name in sums:
                self.model.all_reduce(self.memory[name])

    def run(self, feeds: dict[str, Feed]) -> torch.Tensor:
        with self.model.computing():
            for name in self.fed:
                self.memory[name].copy_(as_tensor(feeds[name]), non_blocking=True)
            if self.graph is not None:
                self.graph.replay()
            else:
                self._queue()
        return self.memory[self.model.signature.logits]


def _shapes(binding: Binding, presents: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Of a run whose results are dropped, but for what it writes into caches, which the next run writes again."""
    outputs = binding.session.get_outputs()
    for value in outputs:
        if value.name in presents:
            binding.output(value.name, presents[value.name])
        else:
            binding.binding.bind_output(value.name)
    binding.run()
    return {value.name: tuple(found.shape()) for value, found in zip(outputs, binding.binding.get_outputs())}
