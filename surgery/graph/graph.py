"""The graph that passes work on: onnx-graphsurgeon's, indexed by op, with its weights left on disk."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo
from onnx_graphsurgeon.ir.tensor import LazyValues

from suture.core.dtypes import HALVES
from suture.core.signature import Signature
from suture.core.third_party import prepare_graphsurgeon
from suture.core.traits import STANDARD, input_index, output_index, unaccounted
from suture.surgery.graph.interface import SourceInterface

SMALL = 1 << 16  # elements; what is larger is a weight and is not read to decide a match


class NoMatch(Exception):
    """Raised by a pass where something near its pattern was found: says which condition failed."""


def need(condition: object, otherwise: str) -> None:
    """Ends the current match as a near miss, with the reason `otherwise`, unless `condition` holds."""
    if not condition:
        raise NoMatch(otherwise)


@dataclass(frozen=True)
class NearMiss:
    node: str
    op: str
    reason: str
    tensor: str  # the node's first output: unlike the node's name it is its own, and stays to the end


class Graph:
    """An onnx-graphsurgeon graph with what passes ask of it.

    `signature` names inputs and outputs; passes that change them keep it true. Nodes that nothing uses any more are
    left to the runner, which removes them after each pass.
    """

    def __init__(self, model: onnx.ModelProto, signature: Signature, root: Path, interface: SourceInterface | None = None):
        prepare_graphsurgeon()
        self.gs = gs.import_onnx(model)
        self.signature = signature
        self.interface = interface or SourceInterface()  # what the source calls the axes of inputs and outputs
        self.root = root  # where external weights lie
        self.weights_file: Path | None = None  # where passes may append weights of their own
        self.added: set[str] = set()  # the locations, absolute paths, of files that passes did append to
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.mask_covers_past = False  # whether the graph itself shows that the mask has a column for every slot
        self.near_misses: list[NearMiss] = []
        self.notes: list[str] = []  # what passes have decided that the user of the graph must know
        self.matched: list[str] = []  # names of the nodes that the current pass has matched, in that order
        self.match_limit: int | None = None  # of the current pass; how a bisection stops half-way
        self._module = ""  # the module path of the node being matched, which new nodes inherit
        self._names = defaultdict(int)
        self._output_ids: set[int] = set()
        self._taken = {*self.gs.tensors(check_duplicates=False), *(node.name for node in self.gs.nodes)}

    # --- finding ---------------------------------------------------------------------------------------------------

    def nodes(self, *ops: str, domain: str = "") -> list[gs.Node]:
        """The nodes of these ops of a domain (""; the standard's), in graph order. One that has more than passes account
        for is not among them, and is a near miss."""
        found = []
        for node in self.gs.nodes:
            if node.op in ops and _domain(node) == domain:
                beyond = self.beyond(node)
                if beyond is None:
                    found.append(node)
                else:
                    self._miss(node, f"{beyond} is not accounted for")
        return found

    def beyond(self, node: gs.Node, known: Iterable[str] | None = None) -> str | None:
        """What of its inputs, attributes and used outputs is not among the names `known` (None: what any pass takes)."""
        outputs = [bool(tensor.outputs) or self.is_output(tensor) for tensor in node.outputs]
        return _beyond(node, outputs, known)

    def need_known(self, node: gs.Node, *known: str) -> None:
        """Ends the current match unless all that the node has is among these names of inputs, attributes and outputs (the
        first output needs none)."""
        beyond = self.beyond(node, known)
        need(beyond is None, f"{beyond} is not accounted for")

    def _miss(self, node: gs.Node, reason: str) -> None:
        miss = NearMiss(node.name, node.op, reason, node.outputs[0].name if node.outputs else "")
        if miss not in self.near_misses:
            self.near_misses.append(miss)

    def match(self, rewrite: Callable[["Graph", gs.Node], bool | None], candidates: Iterable[gs.Node]) -> int:
        """Calls `rewrite(graph, node)` for each candidate; returns how often it said True.

        A rewrite returns something false where the node is not what it looks for and raises NoMatch for a near miss.
        """
        before = len(self.matched)
        self._output_ids = set()  # of the graph as it is now
        for node in candidates:
            if len(self.matched) == self.match_limit:
                break
            name, tensor = node.name, node.outputs[0].name if node.outputs else ""
            self._module = node.name.rsplit("/", 1)[0] + "/" if "/" in node.name else ""
            try:
                if rewrite(self, node):
                    self.matched.append(name)
            except NoMatch as reason:
                self.near_misses.append(NearMiss(name, node.op, str(reason), tensor))
        return len(self.matched) - before

    def input(self, name: str) -> gs.Variable:
        return next(tensor for tensor in self.gs.inputs if tensor.name == name)

    def is_output(self, tensor: gs.Tensor) -> bool:
        if len(self._output_ids) != len(self.gs.outputs):
            self._output_ids = {id(output) for output in self.gs.outputs}
        return id(tensor) in self._output_ids

    def constant(self, tensor: gs.Tensor | None) -> np.ndarray | None:
        """The values of a small constant; None for weights and computed tensors."""
        if not isinstance(tensor, gs.Constant) or np.prod(tensor.shape, dtype=np.int64) > SMALL:
            return None
        if not isinstance(tensor._values, LazyValues):
            return tensor.values
        proto = tensor._values.tensor
        return onnx.numpy_helper.to_array(_inline(proto, self.root) if is_external(proto) else proto)

    def scalar(self, tensor: gs.Tensor | None) -> float | int | bool | None:
        """The value of a constant with one element, whatever its rank; None for anything else."""
        if not isinstance(tensor, gs.Constant) or np.prod(tensor.shape, dtype=np.int64) != 1:
            return None
        return self.constant(tensor).item()

    # --- writing ---------------------------------------------------------------------------------------------------

    def new(
        self,
        op: str,
        inputs: list[gs.Tensor | None],
        attrs: dict | None = None,
        name: str = "",
        dtype: object = None,
        shape: list | None = None,
    ) -> gs.Variable:
        """Adds a node with one output and returns that output. Type and shape default to the first input's type."""
        name = name or self._module + op.lower()
        output = gs.Variable(self.unique(name), onnx_type(inputs[0]) if dtype is None else dtype, shape)
        self._append(op, inputs, attrs, output.name, [output])
        return output

    def replace(
        self, old: gs.Variable, op: str, inputs: list[gs.Tensor | None], attrs: dict | None = None, name: str = ""
    ) -> gs.Node:
        """Adds a node that produces the tensor `old` in place of its former producer."""
        name = name or (old.inputs[0].name if old.inputs else old.name)
        old.inputs.clear()
        return self._append(op, inputs, attrs, name, [old])

    def redirect(self, old: gs.Variable, new: gs.Tensor) -> None:
        """Makes every consumer of `old`, and the graph's outputs, read `new`. `old`'s output name stays."""
        for node in list(old.outputs):
            node.inputs = [new if tensor is old else tensor for tensor in node.inputs]
        if self.is_output(old):
            self.replace(old, "Identity", [new])

    def int64(self, values: int | list[int], name: str = "") -> gs.Constant:
        return gs.Constant(self.unique(name or "int64"), np.array(values, dtype=np.int64))

    def number(self, value: float, dtype: int, name: str = "") -> gs.Constant:
        """A scalar constant of an ONNX float type."""
        array = np.array(value, dtype=onnx.helper.tensor_dtype_to_np_dtype(dtype))
        return gs.Constant(self.unique(name or "number"), LazyValues(onnx.numpy_helper.from_array(array)))

    def unique(self, name: str) -> str:
        """A tensor or node name that nothing in the graph has."""
        candidate = name
        while candidate in self._taken:
            self._names[name] += 1
            candidate = f"{name}_{self._names[name]}"
        self._taken.add(candidate)
        return candidate

    def _append(self, op: str, inputs: list, attrs: dict | None, name: str, outputs: list[gs.Variable]) -> gs.Node:
        filled = [gs.Variable.empty() if tensor is None else tensor for tensor in inputs]
        node = gs.Node(op, name, attrs or {}, filled, outputs)
        self.gs.nodes.append(node)
        return node


def is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def is_weight_file(tensor: gs.Tensor) -> bool:
    """Whether the tensor's bytes lie in a file beside the graph."""
    values = tensor._values if isinstance(tensor, gs.Constant) else None
    return isinstance(values, LazyValues) and is_external(values.tensor)


def _inline(tensor: TensorProto, root: Path) -> TensorProto:
    """The same tensor with its bytes in it. onnx's own reader refuses files with hard links and roots elsewhere."""
    place = ExternalDataInfo(tensor)
    with open(root / place.location, "rb") as file:
        file.seek(place.offset or 0)
        data = file.read(place.length)
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=data)


def _domain(node: gs.Node) -> str:
    return "" if node.domain in STANDARD else node.domain


def _beyond(node: gs.Node, outputs: list[bool], known: Iterable[str] | None = None) -> str | None:
    inputs = [not tensor.is_empty() for tensor in node.inputs]
    return unaccounted(node.op, node.domain, inputs, node.attrs, outputs, None if known is None else tuple(known))


def op_of(node: gs.Node) -> str:
    """The standard operator that the node is; "" for one of another domain, or with more than passes account for."""
    plain = _domain(node) == "" and _beyond(node, [bool(tensor.outputs) for tensor in node.outputs]) is None
    return node.op if plain else ""


def _is(node: gs.Node, ops: tuple[str, ...]) -> bool:
    return not ops or (node.op in ops and op_of(node) != "")


def producer(tensor: gs.Tensor | None, *ops: str) -> gs.Node | None:
    """The node that computes `tensor`, if it is one of the standard's `ops`, with nothing that passes do not account for
    (any node if none are given)."""
    node = tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None
    return node if node is not None and _is(node, ops) else None


def consumers(tensor: gs.Tensor, *ops: str) -> list[gs.Node]:
    """The nodes that read `tensor`, restricted to `ops` if any are given."""
    return [node for node in tensor.outputs if _is(node, ops)]


def only_consumer(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    """The one node that reads `tensor`, if there is just one and its op is one of `ops`."""
    nodes = {id(node): node for node in tensor.outputs}
    node = next(iter(nodes.values())) if len(nodes) == 1 else None
    return node if node is not None and _is(node, ops) else None


def other_input(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    """Of a binary node's two inputs the one that is not `tensor` (the same one where both are)."""
    first, second = node.inputs
    return second if first is tensor else first


def operands(node: gs.Node) -> list[tuple[gs.Tensor, gs.Tensor]]:
    """Both ways round of a commutative node's two inputs."""
    first, second = node.inputs
    return [(first, second), (second, first)]


def through(tensor: gs.Tensor, *ops: str) -> gs.Tensor:
    """Walks up past producers of the given one-input ops and returns the tensor they started from."""
    while (node := producer(tensor, *ops)) is not None:
        tensor = node.inputs[0]
    return tensor


def onnx_type(tensor: gs.Tensor) -> int | None:
    """The onnx.TensorProto type of a tensor; None if unknown."""
    dtype = tensor.dtype
    if dtype is None or isinstance(dtype, int):
        return dtype
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def input_of(node: gs.Node, name: str) -> gs.Tensor | None:
    """What a node takes as the input that its operator calls so (suture.core.traits); None where it takes nothing there."""
    index = input_index(node.op, name, "" if node.domain in STANDARD else node.domain)
    tensor = node.inputs[index] if index < len(node.inputs) else None
    return None if tensor is None or tensor.is_empty() else tensor


def inputs_of(node: gs.Node, *names: str) -> tuple[gs.Tensor | None, ...]:
    return tuple(input_of(node, name) for name in names)


def output_of(node: gs.Node, name: str) -> gs.Variable | None:
    """What a node gives as the output that its operator calls so; None where it leaves that out."""
    index = output_index(node.op, name, "" if node.domain in STANDARD else node.domain)
    tensor = node.outputs[index] if index < len(node.outputs) else None
    return None if tensor is None or tensor.is_empty() else tensor


def set_inputs(node: gs.Node, **named: gs.Tensor | None) -> None:
    """Gives a node the inputs that its operator calls so; None takes one away."""
    inputs = list(node.inputs)
    for name, tensor in named.items():
        index = input_index(node.op, name, "" if node.domain in STANDARD else node.domain)
        inputs += [gs.Variable.empty() for _ in range(index + 1 - len(inputs))]
        inputs[index] = gs.Variable.empty() if tensor is None else tensor
    while inputs and inputs[-1].is_empty():
        inputs.pop()
    node.inputs = inputs


def is_half(tensor: gs.Tensor) -> bool:
    return onnx_type(tensor) in HALVES


def rank(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


def last_axis(axes: object, tensor: gs.Tensor) -> bool:
    """True if `axes` (a number or a sequence of one) names the last axis of `tensor`."""
    axes = np.atleast_1d(axes).tolist()
    return len(axes) == 1 and axes[0] in (-1, (rank(tensor) or 0) - 1)


def static_dim(tensor: gs.Tensor, axis: int) -> int | None:
    """The size of an axis where it is known and fixed."""
    if tensor.shape is None or not -len(tensor.shape) <= axis < len(tensor.shape):
        return None
    size = tensor.shape[axis]
    return int(size) if isinstance(size, int | np.integer) and size >= 0 else None
