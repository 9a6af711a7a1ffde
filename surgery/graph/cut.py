"""What depends only on inputs that change rarely, cut into a graph of its own; its results are inputs of what runs every step.

y = step(x, prompt)  →  results = once(prompt); y = step(x, results)

The prompt's keys and values of every cross-attention, what a time step adds to every block, a picture's features. In the step
stay views, repetitions and transposes of such results, and sizes that are read off their shapes. Repeated tensors would only be
larger inputs, and an engine wants no sizes as inputs. Where the step itself splits keys into heads and turns them, TensorRT reads
the queries as their product leaves them; given keys that are split, it copies these, too (measured: 24 kernels a transformer block
of SD 1.5 in place of 23).
"""

from collections.abc import Collection, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace

from onnx import ModelProto, TensorProto, TypeProto, ValueInfoProto

from suture.core.errors import UserError
from suture.core.proof.cases import RANDOM
from suture.core.signature import Signature, find_signature
from suture.core.subgraphs import reads
from suture.core.tensors import tensor_bytes
from suture.surgery.graph import Graph, files

LATE = ("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Transpose", "Expand", "Tile", "Shape", "Size")
INTEGERS = (TensorProto.INT64, TensorProto.INT32)
LISTS = ("Range", "NonZero")  # as long as a tensor is, and no sizes themselves
STEP = -1  # in the place of a group's number: what every step computes


def once_name(number: int) -> str:
    """What the graph of the group `number`, from 1 on, is called."""
    return "once" if number == 1 else f"once_{number}"


def cut(graph: Graph, groups: Sequence[Collection[str]]) -> tuple[list[Graph], Graph, list[str]]:
    """For each group of inputs the graph of what depends on them alone, the step's graph, which takes their results, and what to
    tell. Raises UserError for a name that is no input's, and where nothing, or everything, depends on a group alone."""
    if not groups:
        return [], graph, []
    _check(graph, groups)
    model = files.infer_shapes(files.inner_model(graph))
    split = _Split(model, groups)
    named = {value.name: value for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
    outputs = [value.name for value in model.graph.output]
    given = [value.name for value in model.graph.input]
    rest = [name for name in outputs if name in given or split.owner.get(name) in (STEP, None)]
    if not rest:
        raise UserError(
            f"--once {' '.join(groups[0])}", "every output depends on it alone, and no step remains", "leave it out"
        )
    results = [[name for name in split.crossing if split.owner[name] == number] for number in range(len(groups))]
    once = []
    for number, group in enumerate(groups):
        if not results[number]:
            what = f"nothing is computed from {'it' if len(group) == 1 else 'them'} alone that a step reads"
            raise UserError(f"--once {' '.join(group)}", what, "leave it out")
        also = [name for name in outputs if name not in (*rest, *results[number]) and split.owner[name] == number]
        inputs = [name for name in given if name in group]
        once.append(_part(graph, model, inputs, [*results[number], *also], named, _blank()))
    crossing = [name for each in results for name in each]
    kept = [name for name in given if split.owner[name] == STEP or name in split.wanted]
    step = _part(graph, model, [*kept, *crossing], rest, named, _without(graph.signature, {*kept, *rest}))
    step.metadata = dict(graph.metadata)
    return once, step, [_said(once_name(number), *each) for number, each in enumerate(zip(groups, once, results), 1)]


def _check(graph: Graph, groups: Sequence[Collection[str]]) -> None:
    inputs = [tensor.name for tensor in graph.gs.inputs]
    caches = {cache.past for cache in graph.signature.caches}
    seen: set[str] = set()
    for name in (name for group in groups for name in group):
        if name not in inputs:
            raise UserError(f"--once {name}", "the graph has no such input", f"choose from {', '.join(inputs)}")
        if name in caches:
            raise UserError(f"--once {name}", "is a cache, which every step changes", "name inputs that stay as they are")
        if name in seen:
            raise UserError(f"--once {name}", "is named twice", "name it once")
        seen.add(name)


@dataclass
class _Split:
    """Whose each tensor is: the number of the group that it depends on alone, STEP, or None for what depends on no input.
    `wanted`: what steps read; `crossing`: those of it that a group's graph computes, in order."""

    model: ModelProto
    groups: Sequence[Collection[str]]
    owner: dict[str, int | None] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=set)
    crossing: list[str] = field(default_factory=list)

    def __post_init__(self):
        graph = self.model.graph
        values = (*graph.value_info, *graph.output)
        typed = {value.name: value.type.tensor_type for value in values if value.type.tensor_type.HasField("shape")}
        number = {name: index for index, group in enumerate(self.groups) for name in group}
        self.owner = {value.name: number.get(value.name, STEP) for value in graph.input}
        sizes: set[str] = set()  # tensors that are read off shapes
        for node in graph.node:
            own = {self.owner.get(name) for name in reads(node)} - {None}
            whose = STEP if len(own) > 1 else own.pop() if own else None
            results = [name for name in node.output if name]
            if node.op_type in RANDOM or not all(name in typed for name in results):
                whose = STEP
            self.owner |= dict.fromkeys(results, whose)
            if node.op_type in ("Shape", "Size") or (
                node.op_type not in LISTS
                and all(name in sizes for name in reads(node) if self.owner.get(name) is not None)
                and all(name in typed and _is_size(typed[name]) for name in results)
            ):
                sizes |= set(results)
        inputs = {value.name for value in graph.input}
        outputs = {value.name for value in graph.output}
        self.wanted = {name for name in outputs if name in inputs or self.owner.get(name) in (STEP, None)}
        for node in reversed(graph.node):
            results = [name for name in node.output if name in self.wanted]
            late = node.op_type in LATE or all(name in sizes for name in results)
            if results and (late or self.owner[results[0]] in (STEP, None)):
                self.wanted |= reads(node)
            else:
                self.crossing[:0] = results


def _is_size(tensor: TypeProto.Tensor) -> bool:
    """Whether it can be a size, or a list of some."""
    return tensor.elem_type in INTEGERS and len(tensor.shape.dim) < 2


def _part(
    graph: Graph, model: ModelProto, inputs: list[str], outputs: list[str], named: dict[str, ValueInfoProto], signature: Signature
) -> Graph:  # fmt: skip
    """What computes these outputs of the model from these tensors, of which they may not read all."""
    wanted, nodes = set(outputs), []
    for node in reversed(model.graph.node):
        if (wanted - set(inputs)) & set(node.output):
            nodes.append(node)
            wanted |= reads(node)
    interface = deepcopy(graph.interface)
    part = ModelProto()
    part.CopyFrom(model)
    part.graph.Clear()
    part.graph.name = model.graph.name
    part.graph.node.extend(reversed(nodes))
    part.graph.input.extend(_with_symbols(named[name], interface.names) for name in inputs)
    part.graph.output.extend(named[name] for name in outputs)
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in wanted)
    part.graph.sparse_initializer.extend(each for each in model.graph.sparse_initializer if each.values.name in wanted)
    made = Graph(files.infer_shapes(part), signature, graph.root, interface)
    made.weights_file, made.added, made.metadata = graph.weights_file, set(graph.added), {}
    return made


def _with_symbols(value: ValueInfoProto, names: dict[str, str]) -> ValueInfoProto:
    """The tensor as an input: an axis that inference says nothing of has a symbol of its own, and no name outside."""
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    for axis, dim in enumerate(copy.type.tensor_type.shape.dim):
        if not dim.HasField("dim_value") and (not dim.dim_param or dim.dim_param.startswith("unk__")):
            dim.dim_param = f"{value.name}.{axis}"
            names[dim.dim_param] = ""
    return copy


def _blank() -> Signature:
    return find_signature(ModelProto(), need_caches=False)


def _without(signature: Signature, there: set[str]) -> Signature:
    """The signature, without the inputs and outputs that are not there any more."""
    names = {each.name: getattr(signature, each.name) for each in fields(signature)}
    gone = {role: None for role, name in names.items() if isinstance(name, str) and name not in there}
    layout = tuple(name for name in signature.layout if name in there)
    encoder = tuple(cache for cache in signature.encoder_caches if cache.past in there)
    return replace(signature, **gone, layout=layout, encoder_caches=encoder)


def _said(name: str, group: Iterable[str], once: Graph, results: list[str]) -> str:
    model = files.inner_model(once)
    size = sum(map(tensor_bytes, model.graph.initializer))
    amount = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"
    what = f"{len(model.graph.node)} nodes and {amount} of weights depend on {', '.join(group)} alone"
    return f"{name}.onnx: {what}; model.onnx takes {len(results)} results of it"
