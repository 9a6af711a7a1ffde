"""ShapeValues of axes as sums and products of the inputs' sizes, followed through a graph and through its shape arithmetic.

onnx's own inference forgets a symbol where it meets a Reshape, so that heads, batch and sequence are unknown one layer
further on. This follows the operators that language models are made of, one node after the other.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, last_axis, onnx_type, op_of, rank, static_dim
from suture.surgery.shapes.symbolic_dims import Axis, Sum, SymbolicDim, add, broadcast, combined, counts, multiply, quotient

INT64 = 7
MOST_DIMS = 16  # of a tensor that is taken for sizes
NO_END = np.iinfo(np.int32).max  # what a Slice up to the last element has as its end, or more
FIRST_INPUT_ALONE = ("RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Softmax", "CumSum", "Pow", "Clip",
                     "ScatterND", "ScatterElements", "TensorScatter")  # fmt: skip
ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Where", "And", "Or", "Not", "Equal", "LessOrEqual", "Less", "Greater",
               "GreaterOrEqual", "Max", "Min", "Cast", "Identity", "Neg", "Sqrt", "Reciprocal", "Erf", "Tanh", "Sigmoid",
               "Swish", "Gelu", "Relu", "Cos", "Sin", "IsNaN", "Mod")  # fmt: skip


class ShapeValues:
    """What is known of every tensor's axes, and of the elements of small integer tensors. Nodes are learnt in topological
    order."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.tensors: list[gs.Tensor] = []  # those that dims refer to
        self.numbers: dict[int, int] = {}  # and their places in this list, by id
        self.holders: dict[Sum, tuple[gs.Tensor, int]] = {}  # a tensor that holds a computed dim, and where
        self.values: dict[int, list[SymbolicDim]] = {}
        self.shapes: dict[int, list[SymbolicDim]] = {}
        self.symbols: dict[str, SymbolicDim] = {}
        self.together: set[frozenset[SymbolicDim]] = set()  # sizes that elementwise operators take for the same
        self._learn_signature()
        tokens = graph.signature.tokens
        for tensor in sorted(graph.gs.inputs, key=lambda tensor: tensor.name != tokens):
            for axis, size in enumerate(tensor.shape or []):
                self._name(size, self.axis(tensor, axis))

    def _learn_signature(self) -> None:
        """What a decoder's signature says: its inputs have the tokens' rows, all caches hold the same past, and each becomes
        longer by the step's tokens. Of a graph without caches it says nothing."""
        signature, ends = self.graph.signature, {t.name: t for t in (*self.graph.gs.inputs, *self.graph.gs.outputs)}
        if not signature.caches or signature.tokens not in ends:
            return
        tokens, first = ends[signature.tokens], ends[signature.caches[0].past]
        batch, steps, past = self._size(tokens, 0), self._size(tokens, 1), self._size(first, 2)
        total = past if signature.static else add([past, steps])
        facts = {signature.positions: [batch, steps], signature.mask: [batch], signature.write_indices: [batch]}
        if self.graph.mask_covers_past:
            facts[signature.mask] = [batch, total]
        facts |= {signature.sequence_lengths: [batch], signature.ntk_alpha: [batch]}
        for cache in signature.caches:
            facts |= {cache.past: [batch, None, past], cache.present: [batch, None, total]}
        for cache in signature.encoder_caches:
            facts[cache.past] = [batch]
        for name, sizes in facts.items():
            shape = (ends[name].shape if name in ends else None) or []
            shape = shape[-2:] if name == signature.positions else shape  # of mrope, there are three before
            for symbol, size in zip(shape, sizes):
                if size is not None:
                    self._name(symbol, size)

    def _size(self, tensor: gs.Tensor, axis: int) -> SymbolicDim:
        size = static_dim(tensor, axis)
        return self.axis(tensor, axis) if size is None else size

    def _name(self, symbol: object, size: SymbolicDim) -> None:
        if isinstance(symbol, str) and symbol and not symbol.startswith("unk__"):
            self.symbols.setdefault(symbol, size)

    def axis(self, tensor: gs.Tensor, axis: int, index: int = 0, counts: bool = True) -> Sum:
        number = self.numbers.setdefault(id(tensor), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(tensor)
        return Sum((((Axis(number, axis, index, counts),), 1),))

    def shape(self, tensor: gs.Tensor) -> list[SymbolicDim] | None:
        """The sizes of a tensor's axes; None if its rank is unknown."""
        if id(tensor) in self.shapes:
            return self.shapes[id(tensor)]
        if rank(tensor) is None:
            return None
        return [self._declared(tensor, axis) for axis in range(rank(tensor))]

    def _declared(self, tensor: gs.Tensor, axis: int) -> SymbolicDim:
        size = tensor.shape[axis]
        if isinstance(size, int | np.integer) and size >= 0:
            return int(size)
        return self.symbols[size] if size in self.symbols else self.axis(tensor, axis)

    def name(self, dim: SymbolicDim) -> int | str | None:
        """A size as a dimension of a shape: a number or a symbol; None where it has no name."""
        if isinstance(dim, int):
            return int(dim)
        terms = []
        for axes, number in dim.terms:
            shapes = [self.tensors[axis.source].shape for axis in axes]
            names = [None if shape is None or axis.axis < 0 else shape[axis.axis] for axis, shape in zip(axes, shapes)]
            if not all(isinstance(name, str) and name and not name.startswith("unk__") for name in names):
                return None
            terms.append("*".join([str(number)] * (number != 1 or not names) + names))
        return " + ".join(sorted(terms))

    # --- elements of small integer tensors ---------------------------------------------------------------------------

    def symbolic_dims(self, tensor: gs.Tensor) -> list[SymbolicDim] | None:
        """What a tensor of rank 0 or 1 holds; None if it is neither, too long, or not of integers."""
        if id(tensor) in self.values:
            return self.values[id(tensor)]
        if isinstance(tensor, gs.Constant):
            values = self.graph.constant(tensor)
            usable = values is not None and values.ndim < 2 and values.size <= MOST_DIMS and values.dtype.kind in "ib"
            return values.reshape(-1).tolist() if usable else None
        length = 1 if rank(tensor) == 0 else (self.shape(tensor)[0] if rank(tensor) == 1 else None)
        if not isinstance(length, int) or length > MOST_DIMS or onnx_type(tensor) != INT64:
            return None
        return [self.axis(tensor, -1, index, counts=False) for index in range(length)]

    def learn(self, node: gs.Node) -> None:
        """Works out the shapes of a node's outputs, and their elements where they are small integer tensors."""
        values = self._values(node)
        if values is not None:
            self.values[id(node.outputs[0])] = values
            for index, dim in enumerate(values):
                if isinstance(dim, Sum):
                    self.holders.setdefault(dim, (node.outputs[0], index))
        for tensor, shape in zip(node.outputs, self._shapes(node)):
            if shape is not None and rank(tensor) in (None, len(shape)):
                shape = [self.axis(tensor, axis) if size is None else size for axis, size in enumerate(shape)]
                declared = self.shape(tensor)
                self.shapes[id(tensor)] = [
                    known if isinstance(known, int) else size for known, size in zip(declared or shape, shape)
                ]

    def _values(self, node: gs.Node) -> list[SymbolicDim] | None:
        op = op_of(node)
        if op == "Shape":
            shape = self.shape(node.inputs[0])
            return None if shape is None else shape[node.attrs.get("start", 0) : node.attrs.get("end")]
        output = node.outputs[0]
        if rank(output) not in (0, 1) or not node.inputs:
            return None
        inputs = [None if tensor.is_empty() else self.symbolic_dims(tensor) for tensor in node.inputs]
        first = inputs[0]
        if first is None:
            return None
        if op in ("Squeeze", "Unsqueeze", "Reshape", "Identity") or (op == "Cast" and node.attrs["to"] == INT64):
            return first
        if None in inputs:
            return None
        if op == "Concat":
            return [dim for dims in inputs for dim in dims]
        if op == "ConstantOfShape":
            fill = node.attrs.get("value")
            fill = 0 if fill is None else np.asarray(fill.values).item()
            plain = len(first) == 1 and isinstance(first[0], int) and first[0] <= MOST_DIMS and isinstance(fill, int)
            return [fill] * first[0] if plain else None
        if op == "Gather" and rank(node.inputs[0]) == 1:
            inside = all(isinstance(i, int) and -len(first) <= i < len(first) for i in inputs[1])
            return [first[i] for i in inputs[1]] if inside else None
        if op == "Slice":
            bounds = [dims[0] for dims in (*inputs[1:3], *inputs[4:5])]
            return first[slice(*bounds)] if all(isinstance(bound, int) for bound in bounds) else None
        if op in ("Add", "Sub", "Mul", "Div", "Equal", "Where"):
            length = max(map(len, inputs))
            if not all(len(dims) in (1, length) for dims in inputs):
                return None
            rows = zip(*(dims * (length // len(dims)) for dims in inputs))
            found = [combined(op, row) for row in rows]
            return None if None in found else found
        return None

    # --- shapes -----------------------------------------------------------------------------------------------------

    def _shapes(self, node: gs.Node) -> list[list[SymbolicDim | None] | None]:
        """The outputs' shapes, None where unknown."""
        op = op_of(node)
        if op == "Range":
            start, end, step = (self.symbolic_dims(tensor) for tensor in node.inputs)
            if None in (start, end) or step != [1] or not all(map(counts, (*start, *end))):
                return [None]
            length = combined("Sub", (end[0], start[0]))
            return [[length] if counts(length) else None]
        inputs = [None if tensor.is_empty() else self.shape(tensor) for tensor in node.inputs]
        x = inputs[0] if inputs else None
        if x is None:
            return [None]
        if op in FIRST_INPUT_ALONE and op != "Pow":
            return [x]
        if op in ELEMENTWISE:
            if None in inputs:
                return [None]
            self._meet(inputs)
            return [broadcast(inputs)]
        if op == "GatherND" and inputs[1] is not None and isinstance(inputs[1][-1], int):
            return [[*inputs[1][:-1], *x[node.attrs.get("batch_dims", 0) + inputs[1][-1] :]]]
        if op == "GatherElements":
            return [inputs[1]]
        if op == "Tile":
            repeats = self.symbolic_dims(node.inputs[1])
            return [None if repeats is None else [multiply(pair) for pair in zip(x, repeats)]]
        if op == "ConstantOfShape":
            return [self.symbolic_dims(node.inputs[0])]
        if op == "Expand":
            target = self.symbolic_dims(node.inputs[1])
            return [None if target is None else broadcast([x, target])]
        if op == "Reshape":
            target = self.filled(node)
            return [None if target is None else [None if size == -1 else size for size in target]]
        if op == "Transpose":
            return [[x[axis] for axis in node.attrs.get("perm", reversed(range(len(x))))]]
        if op in ("Unsqueeze", "Squeeze"):
            return [self._squeezed(node, x)]
        if op == "MatMul":
            y = inputs[1]
            if y is None or len(x) < 2 or len(y) < 2:
                return [None]
            return [[*broadcast([x[:-2], y[:-2]]), x[-2], y[-1]]]
        if op == "Gemm" and inputs[1] is not None:
            return [[x[1 if node.attrs.get("transA") else 0], inputs[1][0 if node.attrs.get("transB") else 1]]]
        if op == "Attention" and len(x) == 4:
            return [None if inputs[2] is None else [*x[:3], inputs[2][3]]]
        if op == "Concat" and None not in inputs:
            axis = node.attrs["axis"] % len(x)
            together = add([shape[axis] for shape in inputs])
            return [[together if i == axis else size for i, size in enumerate(x)]]
        if op in ("Split", "Slice", "ReduceMean", "Gather"):
            return self._parts(node, x, inputs)
        return [None]

    def _meet(self, shapes: list[list[SymbolicDim]]) -> None:
        for sizes in zip(*(reversed(shape) for shape in shapes)):
            symbolic = frozenset(size for size in sizes if not isinstance(size, int))
            if len(symbolic) == 2:
                self.together.add(symbolic)

    def _squeezed(self, node: gs.Node, x: list[SymbolicDim]) -> list[SymbolicDim] | None:
        axes = self.graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None:
            return None
        if node.op == "Squeeze":
            gone = {int(axis) % len(x) for axis in axes.reshape(-1)}
            return [size for axis, size in enumerate(x) if axis not in gone]
        total = len(x) + axes.size
        new = {int(axis) % total for axis in axes.reshape(-1)}
        rest = iter(x)
        return [1 if axis in new else next(rest) for axis in range(total)]

    def _parts(self, node: gs.Node, x: list[SymbolicDim], inputs: list) -> list[list[SymbolicDim | None] | None]:
        """Axes that are neither split, sliced, reduced nor looked up stay."""
        if node.op == "Gather":
            axis = node.attrs.get("axis", 0) % len(x)
            return [None if inputs[1] is None else [*x[:axis], *inputs[1], *x[axis + 1 :]]]
        if node.op == "ReduceMean":
            axes = self.graph.constant(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
            kept = axes is not None and node.attrs.get("keepdims", 1) and last_axis(axes, node.inputs[0])
            return [[*x[:-1], 1] if kept else None]
        if node.op == "Split":
            changed = {node.attrs.get("axis", 0) % len(x)}
        else:
            axes = self.graph.constant(node.inputs[3]) if len(node.inputs) > 3 else np.arange(len(x))
            if axes is None:
                return [None]
            changed = {int(axis) % len(x) for axis in axes.reshape(-1)}
            if len(changed) == 1:
                (axis,) = changed
                return [[self._rest(node, size) if i == axis else size for i, size in enumerate(x)]]
        return [[None if axis in changed else size for axis, size in enumerate(x)] for _ in node.outputs]

    def _rest(self, cut: gs.Node, size: SymbolicDim) -> SymbolicDim | None:
        """How many a Slice of one axis leaves of `size` if it takes all from a place on, as x[total - steps :]."""
        steps = self.graph.constant(cut.inputs[4]) if len(cut.inputs) > 4 else np.array([1])
        starts, ends = (self.symbolic_dims(tensor) for tensor in cut.inputs[1:3])
        if steps is None or starts is None or ends is None or steps.tolist() != [1]:
            return None
        if len(starts) != 1 or len(ends) != 1:  # one axis, named twice
            return None
        (start,), (end,) = starts, ends
        rest = add([size, multiply([start, -1])])
        whole = end == size or (isinstance(end, int) and end >= NO_END)
        return rest if whole and counts(start) and counts(rest) else None

    def filled(self, reshape: gs.Node) -> list[SymbolicDim] | None:
        """The target of a Reshape with the sizes that 0 and -1 stand for, where they are known."""
        x, target = self.shape(reshape.inputs[0]), self.symbolic_dims(reshape.inputs[1])
        if x is None or target is None or (0 in target and reshape.attrs.get("allowzero", 0)):
            return target
        target = [x[i] if size == 0 and isinstance(size, int) and i < len(x) else size for i, size in enumerate(target)]
        if target.count(-1) != 1:
            return target
        left, others = list(x), [size for size in target if size != -1]
        for size in list(others):  # a sum divides what it is a factor of
            if size in left and not isinstance(size, int):
                left.remove(size)
                others.remove(size)
        missing = quotient(multiply(left), multiply(others))
        return target if missing is None else [missing if size == -1 else size for size in target]


def mask_covers_past(graph: Graph) -> bool:
    """Whether the graph itself brings the attention mask's columns together with as many slots as past and step have: that
    the mask has one for each cannot be told from what its axis is called."""
    signature = graph.signature
    mask = next((tensor for tensor in graph.gs.inputs if tensor.name == signature.mask), None)
    if graph.mask_covers_past or mask is None or rank(mask) != 2 or not signature.caches or signature.static:
        return graph.mask_covers_past
    sizes = ShapeValues(graph)
    for node in graph.gs.nodes:
        sizes.learn(node)
    tokens, past = graph.input(signature.tokens), graph.input(signature.caches[0].past)
    total = add([sizes._size(past, 2), sizes._size(tokens, 1)])
    return frozenset((sizes.axis(mask, 1), total)) in sizes.together
