"""What of a graph can be divided among ranks: found from the products whose sum over ranks is the whole result.

Such a product sums over an axis that can be divided. Its input is followed up, and all that reads the same tensors down, until
every end is a product whose weight is divided by columns, a cache, or another such sum. Between these, a rank has its own part of
everything; before and behind, every rank has the whole. A decoder's layer has two such regions: heads, and the MLP's inner width.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from suture.core.errors import UserError
from suture.surgery.graph import Graph, op_of, static_dim
from suture.surgery.parallel.placement import Indivisible, Placement, Share, Whole
from suture.surgery.parallel.relations import PRODUCTS, Placements, Relations
from suture.surgery.shapes.shape_values import ShapeValues

OPTION = "--tensor-parallel"


@dataclass
class Division:
    """By name, since every rank's graph is a copy: `placements` of computed tensors, inputs and outputs; `nodes`, each by its first
    output, that compute on parts; `sums`, those among them whose results are to be added up over ranks."""

    ranks: int
    placements: Placements = field(default_factory=dict)
    nodes: dict[str, Placements] = field(default_factory=dict)  # each with the placements of all its tensors
    sums: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)  # products with weights of which every rank computes all

    def notes(self) -> list[str]:
        kept = (
            f"; on every rank whole: {', '.join(self.whole[:3])}{' ...' if len(self.whole) > 3 else ''}" if self.whole else ""
        )
        return [f"{len(self.sums)} sums over {self.ranks} ranks{kept}"]


def divide(graph: Graph, ranks: int) -> Division:
    """Raises UserError where nothing can be divided, or an attention cannot: its number of heads, or what stands in the way."""
    shapes = ShapeValues(graph)
    for node in graph.gs.nodes:
        shapes.learn(node)
    relations, division = Relations(graph, shapes, ranks), Division(ranks)
    why: dict[str, Whole] = {}
    products = [node for node in graph.gs.nodes if op_of(node) in PRODUCTS and relations.contracted(node)]
    for product in products:
        if product.outputs[0].name not in division.nodes:
            try:
                _add(division, _Region(graph, relations, product))
            except Whole as reason:
                why[product.name] = reason
    division.whole = [node.name for node in products if node.outputs[0].name not in division.nodes]
    numbers = [reason for reason in why.values() if isinstance(reason, Indivisible)]
    undivided = [node for node in graph.gs.nodes if op_of(node) == "Attention" and node.outputs[0].name not in division.nodes]
    if numbers or undivided or not division.sums:
        behind = _next(undivided[0], why) if undivided else None
        reasons = [*numbers, *([why[behind]] if behind else []), *why.values()]
        what = str(reasons[0]) if reasons else "no product with a weight is in it"
        raise UserError(f"{OPTION} {ranks}", what, "give a number that divides it" if numbers else "leave it out")
    return division


def _add(division: Division, region: "_Region") -> None:
    for name, placement in region.known.items():
        if division.placements.setdefault(name, placement) != placement:
            raise Whole(f"{name} is divided in another way already")
    division.nodes |= region.placed
    division.sums += [name for name in region.sums if name not in division.sums]


def _next(node: gs.Node, names: Collection[str]) -> str | None:
    """The first node below that has one of these names."""
    waiting, seen = [node], {id(node)}
    for above in waiting:
        if above.name in names:
            return above.name
        below = [each for tensor in above.outputs for each in tensor.outputs if id(each) not in seen]
        seen |= {id(each) for each in below}
        waiting += below
    return None


class _Region:
    """All that is divided because the input of one product is. Raises Whole where something is in the way."""

    def __init__(self, graph: Graph, relations: Relations, product: gs.Node):
        self.graph, self.relations = graph, relations
        self.caches = {name for each in graph.signature.caches for name in (each.past, each.present) if name}
        self.caches |= {cache.past for cache in graph.signature.encoder_caches}
        self.tensors: dict[str, gs.Tensor] = {}
        self.nodes: dict[str, gs.Node] = {}
        self.known: Placements = {}
        x, weight, summed, _ = relations.contracted(product)
        size = static_dim(weight, summed)
        if size is None:
            raise Whole(f"the size of {weight.name} is not known")
        if size % relations.ranks:
            raise Indivisible(f"{product.name} sums over {size}, which {relations.ranks} ranks do not divide")
        self._place(x, Placement(len(relations.sizes(x)) - 1, (Share(size, relations.ranks),)))
        self._grow()
        self.placed = {name: relations.of(node, self.known, settled=True) or {} for name, node in self.nodes.items()}
        if waiting := next((self.nodes[name] for name, found in self.placed.items() if not found), None):
            raise Whole(f"of {waiting.op} {waiting.name} some results are divided and others are not")
        self.sums = [name for name, node in self.nodes.items() if name not in self.placed[name] and op_of(node) in PRODUCTS]

    def _grow(self) -> None:
        while self._step(settled=False) or self._step(settled=True):
            pass

    def _step(self, settled: bool) -> bool:
        """Adds what follows from what is known. Returns whether there was anything."""
        before = len(self.known)
        for node in list(self.nodes.values()):
            for name, placement in (self.relations.of(node, self.known, settled) or {}).items():
                tensor = next((each for each in (*node.inputs, *node.outputs) if each.name == name), None)
                if tensor is not None and name not in self.known and not isinstance(tensor, gs.Constant):
                    self._place(tensor, placement)
            if settled and len(self.known) > before:
                return True  # one at a time: more may follow from it
        return len(self.known) > before

    def _place(self, tensor: gs.Tensor, placement: Placement) -> None:
        """Records it, with the nodes that compute and read the tensor, which it is something to."""
        name = tensor.name
        if name not in self.caches and (not tensor.inputs or self.graph.is_output(tensor)):
            raise Whole(f"{name} is {'an output' if tensor.inputs else 'an input'} of the graph")
        self.known[name] = placement
        for node in (*tensor.inputs, *tensor.outputs):
            self.nodes[node.outputs[0].name] = node
