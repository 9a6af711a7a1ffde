"""The graph of a deep decoder, from the graph of the same decoder with four layers.

Each node belongs to the last layer whose weights or cache it depends on, or to none. So a layer's nodes begin where its
first weight comes in and end, with the statistics of the next norm, where the next layer's first weight does. Layers 1
and 2 must have the same nodes, one by one in the traced order, reading the same or corresponding tensors. Then layer 2
is written again as often as the model needs, each copy reading from the one before.
"""

import re

import onnx_ir as ir

from suture.export.shallow import KEPT

MODEL, LAST = KEPT - 2, KEPT - 1  # the traced layer that is copied, and the one that stays last
COMMUTATIVE = ("Add", "Mul")  # the tracer writes the terms of a length in either order
LARGEST_CONSTANT = 1 << 16  # elements; what is larger is a weight

Values = dict[ir.Value, ir.Value]


class LayersDiffer(Exception):
    """The traced layers are not the same graph; says where."""


def repeat(graph: ir.Graph, layers: int, blocks: str) -> None:
    """Makes a traced graph of four layers one of `layers`, in place.

    `blocks` is the module path of the list of layers: its weights are named "{blocks}.{layer}.…".
    Raises LayersDiffer before anything is changed.
    """
    layer_of = _layers(graph, blocks)
    first, second, last = ([node for node in graph if layer_of[node] == k] for k in (MODEL - 1, MODEL, LAST))
    next_of = _Comparison(layer_of, blocks).compare(first, second)

    _renumber_last(graph, last, layers - 1, blocks)
    before = {value: value for value in next_of.values()}
    for layer in range(MODEL + 1, layers - 1):
        before = _copy(graph, second, layer, {a: before[b] for a, b in next_of.items()}, blocks)
    for node in last:
        for index, value in enumerate(node.inputs):
            if value in before:
                node.replace_input_with(index, before[value])
    for values in (graph.inputs, graph.outputs):
        _order_caches(values)
    graph.sort()


def _layers(graph: ir.Graph, blocks: str) -> dict[ir.Node, int]:
    """The layer that each node belongs to, -1 for none. A shape is not a layer's: it is the same in all of them."""
    numbered = re.compile(rf"({re.escape(blocks)}|past_key_values)\.(\d+)\.")
    layer_of_value: dict[ir.Value, int] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        found = numbered.match(value.name)
        layer_of_value[value] = int(found[2]) if found else -1
    layers = {}
    for node in graph:
        reads = [] if node.op_type == "Shape" else [value for value in node.inputs if value is not None]
        layers[node] = max((layer_of_value[value] for value in reads), default=-1)
        layer_of_value |= dict.fromkeys(node.outputs, layers[node])
    return layers


class _Comparison:
    """Two layers in a row, walked together."""

    def __init__(self, layer_of: dict[ir.Node, int], blocks: str):
        self.layer_of, self.blocks = layer_of, blocks
        self.next_of: Values = {}  # a tensor of the second layer for each of the first
        self.carried: Values = {}  # what the first reads of the layer before it, for what the second reads of the first

    def compare(self, first: list[ir.Node], second: list[ir.Node]) -> Values:
        """Returns the second layer's tensor for each of the first's. Raises LayersDiffer."""
        if len(first) != len(second):
            raise LayersDiffer(f"layer {MODEL - 1} has {len(first)} nodes, layer {MODEL} has {len(second)}")
        for one, other in zip(first, second):
            if _key(one) != _key(other) or not all(map(self._corresponds, one.inputs, other.inputs)):
                raise LayersDiffer(f"{one.op_type} {one.name} of layer {MODEL - 1} is not {other.op_type} {other.name}")
            self.next_of |= dict(zip(one.outputs, other.outputs))
        return self.next_of

    def _corresponds(self, a: ir.Value | None, b: ir.Value | None) -> bool:
        if a in self.next_of:
            return self.next_of[a] is b
        if b is not None and self.layer_of.get(b.producer()) == MODEL - 1:
            return self.carried.setdefault(b, a) is a  # read from the first as the first reads from before
        return self._same(a, b)

    def _same(self, a: ir.Value | None, b: ir.Value | None) -> bool:
        """Whether tensors that no layer made are one, or each layer's own weight or cache, or computed alike."""
        if a is b:
            return True
        if a is None or b is None:
            return False
        one, other = a.producer(), b.producer()
        if one is None and other is None:
            own = _renumber(a.name, self.blocks, MODEL - 1, MODEL)
            return own == b.name or (own == a.name and _constant(a) is not None and _constant(a) == _constant(b))
        if one is None or other is None or not self.layer_of[one] == self.layer_of[other] == -1:
            return False
        if a.index() != b.index() or _key(one) != _key(other):
            return False
        orders = (other.inputs, other.inputs[::-1]) if one.op_type in COMMUTATIVE else (other.inputs,)
        return any(all(map(self._same, one.inputs, order)) for order in orders)


def _key(node: ir.Node) -> tuple:
    attributes = {name: repr(attribute.value) for name, attribute in node.attributes.items()}
    return node.domain, node.op_type, attributes, len(node.inputs), len(node.outputs)


def _constant(value: ir.Value) -> tuple | None:
    """A small constant's type, shape and bytes; None for a weight."""
    tensor = value.const_value
    if tensor is None or tensor.size > LARGEST_CONSTANT:
        return None
    return tensor.dtype, tuple(tensor.shape), tensor.tobytes()


def _copy(graph: ir.Graph, model: list[ir.Node], layer: int, before: Values, blocks: str) -> Values:
    """Writes the nodes `model` again as `layer`, which reads what `before` says; returns its tensors by model's."""
    own: Values = {}

    def named(text: str) -> str:
        return _renumber(text, blocks, MODEL, layer)

    def read(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in own or value in before:
            return own.get(value) or before.get(value)
        return value if named(value.name) == value.name else _leaf(graph, value, named(value.name))

    for node in model:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [read(value) for value in node.inputs],
            node.attributes.values(),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"{node.name}.{layer}",
            metadata_props={key: named(text) for key, text in node.metadata_props.items()},
        )
        graph.append(copy)
        for value, output in zip(node.outputs, copy.outputs):
            own[value] = output
            output.type, output.shape = value.type, value.shape
            output.name = named(value.name) if value.is_graph_output() else f"{value.name}.{layer}"
            if value.is_graph_output():
                graph.outputs.append(output)
    return own


def _leaf(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """The input or weight `name`, made like `value` where no node has read it yet."""
    known = graph.initializers.get(name) or next((each for each in graph.inputs if each.name == name), None)
    if known is None:
        known = ir.Value(name=name, type=value.type, shape=value.shape)
        if value.is_graph_input():
            graph.inputs.append(known)
        else:
            graph.initializers.add(known)
    return known


def _renumber(text: str, blocks: str, old: int, new: int) -> str:
    """The text with a layer's number changed in names of weights, caches and modules."""
    return re.sub(rf"\b({re.escape(blocks)}|past_key_values|present)\.{old}(?!\d)", rf"\g<1>.{new}", text)


def _renumber_last(graph: ir.Graph, last: list[ir.Node], layer: int, blocks: str) -> None:
    for value in (*graph.inputs, *graph.outputs):
        value.name = _renumber(value.name, blocks, LAST, layer)
    for value in list(graph.initializers.values()):
        name = _renumber(value.name, blocks, LAST, layer)
        if name != value.name:
            del graph.initializers[value.name]
            value.name = name
            graph.initializers.add(value)
    for node in last:
        for key, text in node.metadata_props.items():
            node.metadata_props[key] = _renumber(text, blocks, LAST, layer)


def _order_caches(values: list[ir.Value]) -> None:
    """Puts the caches in the order of their layers, where the first of them stands; the sort keeps key before value."""
    numbered = {value: re.match(r"(?:past_key_values|present)\.(\d+)\.", value.name) for value in values}
    caches = sorted((value for value in values if numbered[value]), key=lambda value: int(numbered[value][1]))
    first = next(i for i, value in enumerate(values) if numbered[value])
    others = [value for value in values if not numbered[value]]
    values[:] = [*others[:first], *caches, *others[first:]]
