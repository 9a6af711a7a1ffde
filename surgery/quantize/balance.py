"""Scales moved from a product's activations into its weights, so that rounding both, or the weights alone, costs less.

    y = x @ W  =  (x / s) @ (diag(s) W)

x / s is free where s goes into what makes x: the weight of a norm, or the outputs of the product before (of values,
whose sums attention only mixes, and of the linear branch of a gated MLP). search.py finds s.
"""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch

from suture.surgery.graph import Graph, NoMatch, inputs_of, need, only_consumer, operands, producer, static_dim
from suture.surgery.quantize.feedback import Feedback
from suture.surgery.quantize.formats import Format
from suture.surgery.quantize.inputs import Inputs
from suture.surgery.quantize.linears import Linear
from suture.surgery.quantize.search import search
from suture.surgery.quantize.writing import scaled_vector

NORMS = ("RMSNormalization", "LayerNormalization")
Divide = Callable[[torch.Tensor], torch.Tensor]


@dataclass(eq=False)
class Group:
    """The products that read one tensor. `divide(s)` makes it x / s; None where nothing before it can."""

    x: gs.Tensor
    linears: list[Linear]
    divide: Divide | None = None
    behind: Linear | None = None  # the product whose outputs `divide` divides; None where it is a norm
    inputs: Inputs | None = None  # what they have read so far
    largest: float | None = None  # of |x / s|, once s is known


def find_groups(graph: Graph, linears: list[Linear], fold: bool) -> list[Group]:
    """The products by what they read, and, where `fold`, how x is divided. Where it cannot be, a near miss says why."""
    groups: dict[int, Group] = {}
    for linear in linears:
        groups.setdefault(id(linear.x), Group(linear.x, [])).linears.append(linear)
    own = {id(linear.node.outputs[0]): linear for linear in linears}
    by_node = {id(group.linears[0].node): group for group in groups.values()}

    def find(graph: Graph, node: gs.Node) -> None:
        group = by_node[id(node)]
        group.divide, group.behind = _divider(graph, group, own)

    if fold:
        graph.match(find, [group.linears[0].node for group in groups.values()])
    return list(groups.values())


def balance(graph: Graph, group: Group, form: Format, group_size: int) -> None:
    """Sets what the group's products are rounded with, from what they have read."""
    scales = torch.ones_like(group.inputs.largest)
    if form.balance and group.divide is not None:
        scales = group.divide(search(graph, group.linears, group.inputs, form, group_size))
    group.largest = float((group.inputs.largest / scales).max())
    feedback = Feedback(group.inputs, scales) if group.inputs.products else None
    for linear in group.linears:
        linear.columns, linear.feedback = scales, feedback
    group.inputs = None


def _divider(graph: Graph, group: Group, own: dict[int, Linear]) -> tuple[Divide, Linear | None]:
    """What divides the group's input by s, and returns the s that it could; and the product that it does so in, if it is
    one. Raises NoMatch."""
    x = group.x
    if (norm := producer(x, *NORMS)) is not None:
        members = {id(linear.node) for linear in group.linears}
        need(all(id(node) in members for node in x.outputs) and not graph.is_output(x), "what it reads is read by others, too")
        need(all(isinstance(tensor, gs.Constant) for tensor in norm.inputs[1:]), "the norm before it has no constant weight")
        return lambda scales: _divide_norm(graph, norm, scales), None
    product = producer(x, "Mul")
    if product is not None:
        for factor, _ in operands(product):
            if only_consumer(factor) is product and (behind := _behind(factor, own)) is not None:
                return lambda scales: _divide_rows(*behind, scales), behind[0]
    if (values := _values(x, own)) is not None:
        behind, heads, kv_heads = values
        return lambda scales: _divide_rows(*behind, scales, heads, kv_heads), behind[0]
    raise NoMatch("nothing before it can take its scales")


def _divide_norm(graph: Graph, norm: gs.Node, scales: torch.Tensor) -> torch.Tensor:
    norm.inputs = [norm.inputs[0], *(scaled_vector(graph, vector, 1 / scales) for vector in norm.inputs[1:])]
    return scales


def _divide_rows(linear: Linear, first: int, scales: torch.Tensor, heads: int = 1, kv_heads: int = 1) -> torch.Tensor:
    """Divides outputs of a product, from its `first` on. Query heads that share values must share scales."""
    if heads != kv_heads:
        shared = scales.reshape(kv_heads, heads // kv_heads, -1).log().mean(1, keepdim=True).exp()
        scales = shared.expand(-1, heads // kv_heads, -1).reshape(-1)
        rows = shared.reshape(-1)
    else:
        rows = scales
    if linear.rows is None:
        linear.rows = torch.ones(linear.outputs)
    linear.rows[first : first + len(rows)] /= rows
    return scales


def _behind(tensor: gs.Tensor, own: dict[int, Linear]) -> tuple[Linear, int] | None:
    """The product, of those that are rounded, whose outputs `tensor` is, and the first of them; read by nothing else."""
    if id(tensor) in own:
        return (own[id(tensor)], 0) if len(tensor.outputs) == 1 else None
    split = producer(tensor, "Split")
    if split is None or split.attrs.get("axis", 0) not in (-1, 1) or len(tensor.outputs) != 1:
        return None
    sizes = [static_dim(part, -1) for part in split.outputs]
    if None in sizes or id(split.inputs[0]) not in own:
        return None
    index = next(index for index, part in enumerate(split.outputs) if part is tensor)
    return own[id(split.inputs[0])], sum(sizes[:index])


def _values(x: gs.Tensor, own: dict[int, Linear]) -> tuple[tuple[Linear, int], int, int] | None:
    """Where x is what attention made of values that nothing else reads: the product that they come from and the first
    of its outputs that they are, and both counts of heads."""
    merged = producer(x, "Reshape")
    turned = producer(merged.inputs[0], "Transpose") if merged is not None else None
    attention = producer(turned.inputs[0], "Attention") if turned is not None else None
    if attention is None:
        return None
    query, cached = inputs_of(attention, "Q", "V")
    update = producer(cached, "TensorScatter", "Concat")
    new = update.inputs[1] if update is not None else cached
    heads, kv_heads, head_dim = static_dim(query, 1), static_dim(new, 1), static_dim(new, 3)
    if not (heads and kv_heads and head_dim) or len(new.outputs) != 1 or len(cached.outputs) != 1:
        return None
    split, before = producer(new, "Split"), 0  # of heads that one product packs
    if split is not None:
        index = next(index for index, part in enumerate(split.outputs) if part is new)
        before = sum(static_dim(part, 1) for part in split.outputs[:index])
    turned = producer(split.inputs[0] if split is not None else new, "Transpose")
    apart = producer(turned.inputs[0], "Reshape") if turned is not None else None
    behind = _behind(apart.inputs[0], own) if apart is not None else None
    return None if behind is None else ((behind[0], behind[1] + before * head_dim), heads, kv_heads)
