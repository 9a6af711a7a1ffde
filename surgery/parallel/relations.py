"""What a placement of one of a node's tensors means for its others, operator by operator.

A node computes the same on a part as on the whole where the divided axis is one that it computes independently along: an
elementwise operator on any axis, a normalisation or Softmax on another axis than its own, Attention on its heads. A product with
a weight W is where parts begin and end:

    by columns   y[:, part] = x · W[:, part]
    by rows      y = Σ over ranks x[:, part] · W[part, :]

What an operator that is not listed here does with a part is not known, and its tensors stay whole.
"""

from collections.abc import Callable

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, inputs_of, op_of, output_of, rank
from suture.surgery.parallel.placement import Indivisible, Placement, Share, Whole
from suture.surgery.parallel.views import carried, shared_out, slice_bounds
from suture.surgery.shapes.shape_values import ShapeValues
from suture.surgery.shapes.symbolic_dims import SymbolicDim

Placements = dict[str, Placement]  # by tensor
UNARY = ("Abs", "Cast", "Clip", "Cos", "Erf", "Gelu", "Identity", "IsNaN", "Neg", "Not", "Reciprocal", "Relu", "Sigmoid", "Sin",
         "Sqrt", "Swish", "Tanh")  # fmt: skip
ELEMENTWISE = ("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Or", "Pow",
               "Sub", "Where")  # fmt: skip
ALONG_LAST = ("RMSNormalization", "LayerNormalization", "Softmax")
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
PRODUCTS = ("Gemm", "MatMul")


class Relations:
    """Of a graph whose shapes are known, for this many ranks."""

    def __init__(self, graph: Graph, shapes: ShapeValues, ranks: int):
        self.graph, self.shapes, self.ranks = graph, shapes, ranks
        self.settled, self.every = False, {}
        self.weights: dict[int, bool] = {}
        self.rules: dict[str, Callable[[gs.Node, Placements], Placements | None]] = {
            **dict.fromkeys(UNARY, self._unary),
            **dict.fromkeys(ELEMENTWISE, self._elementwise),
            **dict.fromkeys(ALONG_LAST, self._along_last),
            **dict.fromkeys(VIEWS, self._view),
            **dict.fromkeys(PRODUCTS, self._product),
            "Attention": self._attention,
            "Concat": self._concat,
            "DequantizeLinear": self._quantisation,
            "Expand": self._expand,
            "Gather": self._gather,
            "QuantizeLinear": self._quantisation,
            "RotaryEmbedding": self._rotary,
            "Shape": self._shape,
            "Slice": self._slice,
            "Split": self._split,
            "TensorScatter": self._scatter,
            "Transpose": self._transpose,
        }

    def of(self, node: gs.Node, known: Placements, settled: bool = False) -> Placements | None:
        """All of the node's tensors that are divided, given those `known` of them; None where more must be known first. `settled`:
        no more will be, and results that nothing divides are whole on every rank. Raises Whole where the node does not go with
        them."""
        rule = self.rules.get(op_of(node))
        if rule is None:
            raise Whole(f"what {node.op} {node.name} computes on a part of its input is not known")
        self.every = known
        own = {tensor.name: known[tensor.name] for tensor in (*node.inputs, *node.outputs) if tensor.name in known}
        self.settled = settled
        try:
            found = rule(node, own)
        except Indivisible as error:
            raise Indivisible(f"{error} ({node.op} {node.name})") from None
        except Whole as error:
            raise Whole(f"{node.op} {node.name}: {error}") from None
        if found is not None and any(found.get(name) != placement for name, placement in own.items()):
            raise Whole(f"{node.op} {node.name} would need its tensors divided in another way")
        return found

    def is_weight(self, tensor: gs.Tensor) -> bool:
        """Whether it is computed of constants alone."""
        if id(tensor) not in self.weights:
            producers = tensor.inputs
            self.weights[id(tensor)] = isinstance(tensor, gs.Constant) or bool(
                producers
                and producers[0].inputs
                and all(self.is_weight(above) for above in producers[0].inputs if not above.is_empty())
            )
        return self.weights[id(tensor)]

    def contracted(self, product: gs.Node) -> tuple[gs.Tensor, gs.Tensor, int, int] | None:
        """Of a product with a weight: input, weight, and of the weight the axis that is summed over and the other one."""
        x, weight = product.inputs[:2]
        if not self.is_weight(weight) or self.is_weight(x) or rank(weight) != 2:
            return None
        if product.op == "MatMul":
            return x, weight, 0, 1
        turned = product.attrs.get("transB", 0)
        return None if product.attrs.get("transA", 0) else (x, weight, 1, 0) if turned else (x, weight, 0, 1)

    # --- axes ---------------------------------------------------------------------------------------------------------

    def sizes(self, tensor: gs.Tensor) -> list[SymbolicDim]:
        found = self.shapes.shape(tensor)
        if found is None:
            raise Whole(f"the rank of {tensor.name} is not known")
        return found

    def _against(self, tensor: gs.Tensor, placement: Placement, length: int) -> Placement | None:
        """The placement, of an axis of a result of rank `length`, on what is broadcast to it; None where that has one element."""
        sizes = self.sizes(tensor)
        axis = placement.axis - (length - len(sizes))
        if axis < 0 or sizes[axis] == 1:
            return None
        if sizes[axis] != placement.size:
            raise Whole(f"{tensor.name} has {sizes[axis]} elements in place of {placement.size}")
        return placement.at(axis)

    def _broadcast(self, inputs: list[gs.Tensor], output: gs.Tensor, known: Placements) -> Placements:
        """Of an elementwise operator: from any of its tensors to all."""
        length = len(self.sizes(output))
        placement = known.get(output.name)
        if placement is None:
            tensor = next(each for each in inputs if each.name in known)
            placement = known[tensor.name].at(known[tensor.name].axis + length - len(self.sizes(tensor)))
        found = {output.name: placement}
        for tensor in inputs:
            if not tensor.is_empty() and (own := self._against(tensor, placement, length)) is not None:
                found[tensor.name] = own
        return found

    # --- operators that leave the axis where it is ----------------------------------------------------------------------

    def _unary(self, node: gs.Node, known: Placements) -> Placements:
        return self._same(node.inputs[:1], node.outputs[:1], known)

    def _same(self, inputs: list[gs.Tensor], outputs: list[gs.Tensor], known: Placements) -> Placements:
        placement = next(iter(known.values()))
        return {tensor.name: placement for tensor in (*inputs, *outputs)}

    def _elementwise(self, node: gs.Node, known: Placements) -> Placements:
        return self._broadcast(node.inputs, node.outputs[0], known)

    def _along_last(self, node: gs.Node, known: Placements) -> Placements:
        placement, length = next(iter(known.values())), len(self.sizes(node.inputs[0]))
        first = node.attrs.get("axis", -1) % length
        if placement.axis == first or (placement.axis > first and node.op != "Softmax"):
            raise Whole("it computes along the divided axis")
        found = self._same(node.inputs[:1], node.outputs[:1], known)
        for tensor in node.inputs[1:]:  # scale and bias, which may have more axes than the normalised ones
            if not tensor.is_empty() and (own := self._against(tensor, placement, length)) is not None:
                found[tensor.name] = own
        return found

    def _scatter(self, node: gs.Node, known: Placements) -> Placements:
        past, update, _ = inputs_of(node, "past_cache", "update", "write_indices")
        axis = node.attrs.get("axis", -2) % len(self.sizes(past))
        if next(iter(known.values())).axis in (0, axis):
            raise Whole("it writes along the divided axis")
        return self._same([past, update], node.outputs[:1], known)

    def _shape(self, node: gs.Node, known: Placements) -> Placements:
        sizes, axis = self.sizes(node.inputs[0]), known[node.inputs[0].name].axis
        if axis in range(len(sizes))[node.attrs.get("start", 0) : node.attrs.get("end")]:
            raise Whole("it reads the size of the divided axis")
        return known

    def _rotary(self, node: gs.Node, known: Placements) -> Placements:
        (placement,) = set(known.values())
        if placement.axis != (1 if len(self.sizes(node.inputs[0])) == 4 else 2):
            raise Whole("the divided axis is not that of its heads")
        return self._same(node.inputs[:1], node.outputs[:1], known)

    # --- operators that move the axis -----------------------------------------------------------------------------------

    def _transpose(self, node: gs.Node, known: Placements) -> Placements:
        source, result = node.inputs[0], node.outputs[0]
        order = list(node.attrs.get("perm", reversed(range(len(self.sizes(source))))))
        if result.name in known:
            placement = known[result.name]
            return {source.name: placement.at(order[placement.axis]), result.name: placement}
        placement = known[source.name]
        return {source.name: placement, result.name: placement.at(order.index(placement.axis))}

    def _gather(self, node: gs.Node, known: Placements) -> Placements:
        data, indices, result = node.inputs[0], node.inputs[1], node.outputs[0]
        axis, wide = node.attrs.get("axis", 0) % len(self.sizes(data)), len(self.sizes(indices)) - 1
        if indices.name in known:
            raise Whole("its indices are divided")
        if data.name in known:
            placement = known[data.name]
            if placement.axis == axis:
                raise Whole("it looks up along the divided axis")
            return {data.name: placement, result.name: placement.at(placement.axis + wide * (placement.axis > axis))}
        placement = known[result.name]
        if axis <= placement.axis <= axis + wide:
            raise Whole("its indices would be divided")
        return {data.name: placement.at(placement.axis - wide * (placement.axis > axis)), result.name: placement}

    def _view(self, node: gs.Node, known: Placements) -> Placements:
        source, result = node.inputs[0], node.outputs[0]
        sizes = self.sizes(source), self.sizes(result)
        if result.name in known:
            return {source.name: carried(known[result.name], sizes[1], sizes[0]), result.name: known[result.name]}
        return {source.name: known[source.name], result.name: carried(known[source.name], *sizes)}

    def _expand(self, node: gs.Node, known: Placements) -> Placements:
        return self._broadcast(node.inputs[:1], node.outputs[0], known)

    def _split(self, node: gs.Node, known: Placements) -> Placements | None:
        source = node.inputs[0]
        axis = node.attrs.get("axis", 0) % len(self.sizes(source))
        if next(iter(known.values())).axis != axis:
            return self._same([source], node.outputs, known)
        return self._put_together(source, list(node.outputs), axis, known)

    def _concat(self, node: gs.Node, known: Placements) -> Placements | None:
        result = node.outputs[0]
        axis = node.attrs["axis"] % len(self.sizes(result))
        if next(iter(known.values())).axis != axis:
            return self._same(node.inputs, [result], known)
        return self._put_together(result, list(node.inputs), axis, known)

    def _slice(self, node: gs.Node, known: Placements) -> Placements | None:
        """Of the divided axis only where all that reads the tensor slices it there, and the slices lie side by side."""
        source, result = node.inputs[0], node.outputs[0]
        sizes = self.sizes(source)
        cut = slice_bounds(self.graph, node, sizes)
        if cut is None:
            raise Whole("where it cuts is computed")
        if next(iter(known.values())).axis not in cut:
            return self._same([source], [result], known)
        (axis, (start, _)), *more = cut.items()
        together = {start: result}
        for other in source.outputs:
            bounds = slice_bounds(self.graph, other, sizes) if op_of(other) == "Slice" else None
            if more or bounds is None or list(bounds) != [axis]:
                raise Whole("others read the axis that it cuts")
            together[bounds[axis][0]] = other.outputs[0]
        ends, parts = 0, [together[each] for each in sorted(together)]
        for first, part in zip(sorted(together), parts):
            size = self.sizes(part)[axis]
            if first != ends or not isinstance(size, int):
                raise Whole("what is cut does not lie side by side")
            ends += size
        found = self._put_together(
            source, parts, axis, {**known, **{p.name: self.every[p.name] for p in parts if p.name in self.every}}
        )
        return None if found is None else {name: found[name] for name in (source.name, result.name) if name in found}

    def _put_together(self, whole: gs.Tensor, tensors: list[gs.Tensor], axis: int, known: Placements) -> Placements | None:
        """Of a tensor that is made of others, one after the other on this axis."""
        sizes = [self.sizes(tensor)[axis] for tensor in tensors]
        parts: list[Placement | None] = [known.get(tensor.name) for tensor in tensors]
        if None in parts and whole.name in known:
            parts = shared_out(known[whole.name], sizes)
        if None in parts and self.settled:
            parts = [
                part or (Placement(axis, (Share(size, 1),)) if isinstance(size, int) else None)
                for part, size in zip(parts, sizes)
            ]
        if None in parts:
            return None
        together = Placement(axis, tuple(part for placement in parts if placement is not None for part in placement.parts))
        found = {whole.name: together} | {t.name: part for t, part in zip(tensors, parts) if part is not None and part.divides}
        return {name: placement for name, placement in found.items() if name == whole.name or placement.divides}

    # --- products, attention, quantisation ------------------------------------------------------------------------------

    def _product(self, node: gs.Node, known: Placements) -> Placements:
        found = self.contracted(node)
        if found is None:
            return self._product_of_activations(node, known)
        (x, weight, summed, kept), y = found, node.outputs[0]
        bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
        if x.name in known:
            placement = known[x.name]
            if placement.axis != len(self.sizes(x)) - 1:
                raise Whole("the divided axis is that of its rows")
            if bias is not None and node.attrs.get("beta", 1.0) != 1.0:
                raise Whole("its bias has a factor")
            return {x.name: placement, weight.name: placement.at(summed)}
        placement = known[y.name] if y.name in known else known[weight.name].at(len(self.sizes(y)) - 1)
        if placement.axis != len(self.sizes(y)) - 1:
            raise Whole("the divided axis is that of its rows")
        divided = {y.name: placement, weight.name: placement.at(kept)}
        if bias is not None and (own := self._against(bias, placement, 2)) is not None:
            divided[bias.name] = own
        return divided

    def _product_of_activations(self, node: gs.Node, known: Placements) -> Placements:
        if node.op != "MatMul":
            raise Whole("no weight is in it")
        length = len(self.sizes(node.outputs[0]))
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name in known and known[tensor.name].axis + length - len(self.sizes(tensor)) >= length - 2:
                raise Whole("the divided axis is none of its batch")
        return self._broadcast(node.inputs, node.outputs[0], known)

    def _attention(self, node: gs.Node, known: Placements) -> Placements:
        names = ("Q", "K", "V", "past_key", "past_value", "attn_mask")
        query, key, value, past_key, past_value, mask = inputs_of(node, *names)
        packed = len(self.sizes(query)) == 3
        heads = node.attrs["q_num_heads"] if packed else self.sizes(query)[1]
        groups = node.attrs["kv_num_heads"] if packed else self.sizes(key)[1]
        if not isinstance(heads, int):  # which some shape arithmetic says
            heads = next((known[tensor.name].size for tensor in (query, node.outputs[0]) if tensor.name in known), heads)
        if not isinstance(heads, int) or not isinstance(groups, int):
            raise Whole("how many heads it has is not known")
        if heads % self.ranks:
            raise Indivisible(f"{heads} heads do not divide by {self.ranks} ranks")
        if groups % self.ranks and self.ranks % groups:
            raise Indivisible(f"{groups} kv_heads do not divide by {self.ranks} ranks, nor {self.ranks} by {groups}")
        queries, keys = Share(heads, self.ranks), Share(groups, min(groups, self.ranks))

        def on(tensor: gs.Tensor, part: Share) -> Placement:
            if not packed:
                return Placement(1, (part,))
            width = self.sizes(tensor)[2]
            if not isinstance(width, int):
                raise Whole(f"the width of {tensor.name} is not known")
            return Placement(2, (part,)).scaled(2, width, part.size)

        found = {query.name: on(query, queries), node.outputs[0].name: on(node.outputs[0], queries)}
        if keys.pieces > 1:  # one head of keys and values is whole on every rank
            found |= {key.name: on(key, keys), value.name: on(value, keys)}
            caches = (past_key, past_value, *(output_of(node, name) for name in ("present_key", "present_value")))
            found |= {tensor.name: Placement(1, (keys,)) for tensor in caches if tensor is not None}
        if mask is not None and (own := self._against(mask, Placement(1, (queries,)), 4)) is not None:
            found[mask.name] = own
        return found

    def _quantisation(self, node: gs.Node, known: Placements) -> Placements:
        x, result = node.inputs[0], node.outputs[0]
        placement, sizes = next(known[t.name] for t in (x, result) if t.name in known), self.sizes(x)
        along, block = node.attrs.get("axis", 1) % max(len(sizes), 1), node.attrs.get("block_size", 0)
        found = {x.name: placement, result.name: placement}
        for tensor in node.inputs[1:]:
            if tensor.is_empty():
                continue
            own = self.sizes(tensor)
            if len(own) == len(sizes) and len(own) > 1:
                if placement.axis == along and block:
                    found[tensor.name] = placement.scaled(along, 1, block)
                elif own[placement.axis] != 1:
                    found[tensor.name] = placement
            elif len(own) == 1 and own != [1] and placement.axis == along:
                found[tensor.name] = placement.at(0)
        return found
