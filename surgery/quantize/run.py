"""Quantises a portable graph: products with weights and tables of embeddings become products with dequantised ones.

y = x @ W  →  x @ DequantizeLinear(q, scales)
y = x @ W  →  DequantizeLinear(QuantizeLinear(x)) @ DequantizeLinear(q, scales)        int8-smoothquant, fp8
"""

import numpy as np
import onnx_graphsurgeon as gs
import torch

from suture.core.errors import UserError
from suture.core.progress import counted
from suture.core.signature import QUANTIZED
from suture.surgery.graph import Graph, files
from suture.surgery.quantize.balance import Group, balance, find_groups
from suture.surgery.quantize.caches import quantise_caches
from suture.surgery.quantize.formats import CACHES, FORMATS, HEADS, TABLES, Format
from suture.surgery.quantize.inputs import Inputs
from suture.surgery.quantize.linears import Linear, excluded, find_linears, find_tables
from suture.surgery.quantize.observe import observe
from suture.surgery.quantize.options import Request
from suture.surgery.quantize.writing import has_room, round_linear, write_linear, write_rounding, write_table


def quantise(graph: Graph, request: Request, windows: np.ndarray | None) -> int:
    """Quantises the graph in place. `windows`, token ids [windows, tokens], is what formats are fitted to that need it.
    Returns how many products, tables and caches changed; what could not is in graph.near_misses."""
    if windows is not None and graph.signature.embedding_width is not None:
        raise UserError(str(request), "is fitted to token ids, and the graph takes embeddings", "choose a format that is not")
    matches = _quantise_weights(graph, request, windows) if request.format else 0
    if request.kv_cache != "none":
        matches += quantise_caches(graph, CACHES[request.kv_cache], windows)
    graph.metadata[QUANTIZED] = str(request)
    return matches


def _quantise_weights(graph: Graph, request: Request, windows: np.ndarray | None) -> int:
    """Raises UserError where there is nothing to quantise."""
    form = FORMATS[request.format]
    linears = find_linears(graph)
    if not linears:
        raise UserError("--quantize", "the graph has no product with a weight in floats", "give one that is not quantised")
    left = excluded(linears, request.exclude)
    forms = {
        id(linear.node): HEADS[request.lm_head] if linear.is_head else form for linear in linears if id(linear) not in left
    }
    by_node = {id(linear.node): linear for linear in linears}
    groups = {}
    if form.calibrated:
        body = [linear for linear in linears if not linear.is_head and id(linear) not in left]
        groups = _fitted(graph, body, request, windows)
    rounded: dict[int, gs.Tensor] = {}

    def write(graph: Graph, node: gs.Node) -> bool:
        linear, chosen = by_node[id(node)], forms.get(id(node))
        if chosen is None:
            return False
        group, x = groups.get(id(linear)), linear.x
        if chosen.activations:
            if id(x) not in rounded:
                rounded[id(x)] = write_rounding(graph, x, chosen.values, group.largest, f"{node.name}/x")
            x = rounded[id(x)]
        write_linear(graph, linear, chosen, request.group_size, x)
        return True

    def write_rows(graph: Graph, gather: gs.Node) -> bool:
        write_table(graph, gather, TABLES[request.embedding])
        return True

    nodes = [linear.node for linear in linears]
    matches = graph.match(write, counted("surgery", f"writing {request.format}", nodes, len(nodes)))
    if TABLES[request.embedding]:
        matches += graph.match(write_rows, find_tables(graph))
    files.remove_unused(graph)
    return matches


def _fitted(graph: Graph, linears: list[Linear], request: Request, windows: np.ndarray) -> dict[int, Group]:
    """The group of each product, by id, fitted to the text and its weights rounded: each as soon as all is known that it
    depends on, so that what is known of one layer is forgotten in the next."""
    form = FORMATS[request.format]
    fits = [linear for linear in linears if has_room(linear, form, request.group_size)]
    groups = {id(group.x): group for group in find_groups(graph, fits, fold=form.balance is not None)}
    waiting = list(groups.values())
    observed = observe(graph, [group.x for group in waiting], windows)
    for tensor, values in counted("surgery", f"fitting {request.format} to text", observed, len(waiting) * len(windows)):
        group, x = groups[id(tensor)], torch.from_numpy(values.reshape(-1, values.shape[-1]))
        group.inputs = group.inputs or Inputs.of(x.shape[1])
        group.inputs.add(x, form, 1 / len(windows))
        if group.inputs.tokens == windows.size:
            balance(graph, group, form, request.group_size)
            waiting = _round_ready(graph, waiting, form, request.group_size)
    return {id(linear): group for group in groups.values() for linear in group.linears}


def _round_ready(graph: Graph, waiting: list[Group], form: Format, group_size: int) -> list[Group]:
    """Rounds the groups that are balanced and whose outputs no other will divide any more; returns the others."""
    open_ended = {id(group.behind) for group in waiting if group.largest is None}
    left = []
    for group in waiting:
        if group.largest is None or any(id(linear) in open_ended for linear in group.linears):
            left.append(group)
            continue
        for linear in group.linears:
            linear.rounded = round_linear(graph, linear, form, group_size)
            linear.feedback = None
    return left
