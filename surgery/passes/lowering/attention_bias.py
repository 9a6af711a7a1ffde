"""What Attention hides and adds, as one tensor that is added to the scores, made once for all layers that hide the same."""

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from suture.core.additive_mask import HIDDEN
from suture.surgery.graph import Graph, input_of, inputs_of, need, onnx_type, producer, rank, static_dim
from suture.surgery.graph.files import sort
from suture.surgery.masks.mask_builders import causal_bias, count_up, masked_out
from suture.surgery.masks.mask_probe import evaluate, probes
from suture.surgery.shapes.shape_values import ShapeValues
from suture.surgery.shapes.symbolic_dims import SymbolicDim

BOOL = onnx.TensorProto.BOOL


@dataclass
class Masks:
    """What attentions have in common, by what it is made of."""

    sizes: ShapeValues
    visible: dict[tuple, gs.Tensor] = field(default_factory=dict)
    biases: dict[tuple, gs.Tensor] = field(default_factory=dict)
    steps: dict[int, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph) -> "Masks":
        sort(graph)
        sizes = ShapeValues(graph)
        for node in graph.gs.nodes:
            sizes.learn(node)
        return cls(sizes)


def bias(graph: Graph, attention: gs.Node, masks: Masks) -> gs.Tensor | None:
    """What is added to the scores [B, H, S, T] of an Attention of rank 4 without a past, of four dimensions and in the query's
    type: its mask, and a large negative number where is_causal or the valid length hides. None where there is nothing.

    Token i sees the slots up to i, and up to valid length - S + i where a valid length is given. Where that is
    write_indices + S, as over a cache that a step has just written, the mask is the one of all static caches.
    """
    query, keys = inputs_of(attention, "Q", "K")
    mask, valid = inputs_of(attention, "attn_mask", "nonpad_kv_seqlen")
    dtype, causal = onnx_type(query), bool(attention.attrs.get("is_causal", 0))
    if mask is not None:
        need(rank(mask) in (2, 3, 4), f"its mask has rank {rank(mask)}")
        width, total = static_dim(mask, -1), static_dim(keys, 2)
        need(width in (None, total) or (total is None and width != 1), "its mask is shorter than its keys")
    update = producer(keys, "TensorScatter")
    if causal and mask is None and valid is not None and update is not None and _ends_step(graph, valid, update, masks):
        past, write_indices = inputs_of(update, "past_cache", "write_indices")
        key = (id(write_indices), dtype)
        if key not in masks.biases:
            masks.biases[key] = causal_bias(graph, write_indices, past, dtype)
        return masks.biases[key]
    visible = _visible(graph, query, keys, valid, causal, masks) if causal or valid is not None else None
    if visible is None and mask is None:
        return None
    key = (id(mask), id(visible), dtype)
    if key not in masks.biases:
        masks.biases[key] = _as_bias(graph, visible, mask, dtype)
    return masks.biases[key]


def _as_bias(graph: Graph, visible: gs.Tensor | None, mask: gs.Tensor | None, dtype: int) -> gs.Tensor:
    if mask is not None and rank(mask) < 4:
        ones = [1] * (4 - rank(mask))
        mask = graph.new("Unsqueeze", [mask, graph.int64(list(range(len(ones))))], shape=[*ones, *mask.shape])
    parts = [each.shape for each in (visible, mask) if each is not None]
    lowest = masked_out(graph, dtype)
    added: gs.Tensor = graph.number(0, dtype)
    if mask is not None and onnx_type(mask) != BOOL:
        mask = _in_type(graph, mask, dtype)
        if visible is None:
            return mask
        added = mask
    elif mask is not None:
        both = [visible, mask]
        visible = mask if visible is None else graph.new("And", both, name="mask/visible", dtype=np.bool_)
    shape = [next((size for size in sizes if size != 1), 1) for sizes in zip(*parts)]
    return graph.new("Where", [visible, added, lowest], name="mask/additive", dtype=dtype, shape=shape)


def _in_type(graph: Graph, mask: gs.Tensor, dtype: int) -> gs.Tensor:
    """A mask that is added, in the query's type: what float16 has no number for hides there as what hides does."""
    if onnx_type(mask) == dtype:
        return mask
    need(onnx_type(mask) in HIDDEN, "its mask is neither added nor boolean")
    least = graph.number(HIDDEN[dtype], onnx_type(mask))
    held = graph.new("Max", [mask, least], name="mask/held", shape=mask.shape)
    return graph.new("Cast", [held], {"to": dtype}, "mask/cast", dtype, mask.shape)


def _visible(
    graph: Graph, query: gs.Tensor, keys: gs.Tensor, valid: gs.Tensor | None, causal: bool, masks: Masks
) -> gs.Variable:
    """bool [B or 1, 1, S or 1, T]."""
    steps, total = _size(graph, query, masks), _size(graph, keys, masks)
    key = (id(valid), causal, steps.key, total.key)
    if key in masks.visible:
        return masks.visible[key]
    slots = count_up(graph, total.number(graph), "mask/slots", total.size)
    batch = 1 if valid is None else valid.shape[0] if rank(valid) else None
    end = None if valid is None else graph.new("Unsqueeze", [valid, graph.int64([1, 2, 3])], name="mask/valid_slots")
    if causal:
        own = count_up(graph, steps.number(graph), "mask/tokens", steps.size)
        own = graph.new("Unsqueeze", [own, graph.int64([0, 1, 3])], name="mask/own_slot", shape=[1, 1, steps.size, 1])
        if end is not None:
            first = graph.new("Sub", [end, steps.number(graph)], name="mask/first_slot")
            own = graph.new("Add", [own, first], name="mask/own_slot", shape=[batch, 1, steps.size, 1])
    op, limit = ("LessOrEqual", own) if causal else ("Less", end)
    shape = [batch, 1, steps.size if causal else 1, total.size]
    masks.visible[key] = graph.new(op, [slots, limit], name="mask/visible", dtype=np.bool_, shape=shape)
    return masks.visible[key]


@dataclass
class Size:
    """The length of a tensor [B, H, length, D]; two of one key are the same."""

    tensor: gs.Tensor
    key: SymbolicDim | tuple[int]

    @property
    def size(self) -> int | str | None:
        return self.tensor.shape[2]

    def number(self, graph: Graph) -> gs.Tensor:
        if isinstance(self.key, int):
            return graph.int64(self.key)
        size = graph.new("Shape", [self.tensor], {"start": 2, "end": 3}, name="mask/length", dtype=np.int64, shape=[1])
        return graph.new("Squeeze", [size], name="mask/length", dtype=np.int64, shape=[])


def _size(graph: Graph, tensor: gs.Tensor, masks: Masks) -> Size:
    fixed, known = static_dim(tensor, 2), masks.sizes.shape(tensor)
    own = (id(tensor),)
    return Size(tensor, fixed if fixed is not None else own if known is None or known[2] is None else known[2])


def _ends_step(graph: Graph, valid: gs.Tensor, update: gs.Node, masks: Masks) -> bool:
    """Whether the valid length is the slot of the step's first token and the number of its tokens, in every row."""
    write_indices = input_of(update, "write_indices")
    if write_indices is None or write_indices.name != graph.signature.write_indices or not graph.signature.tokens:
        return False
    if id(valid) not in masks.steps:
        found = [(probe, evaluate(graph, [valid], probe)) for probe in probes(graph)]
        masks.steps[id(valid)] = all(
            values is not None and np.array_equal(values[0].ravel(), np.full(probe.batch, probe.past + probe.steps))
            for probe, values in found
        )
    return masks.steps[id(valid)]
