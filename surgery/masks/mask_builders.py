"""What a mask in a graph is made of: counted slots, which of them each token of a step sees, and what hides the others; of two
masks one."""

from dataclasses import replace
from itertools import zip_longest

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.core.additive_mask import HIDDEN
from suture.core.signature import SEQUENCE_LENGTHS
from suture.surgery.graph import Graph, need, onnx_type, rank


def masked_out(graph: Graph, dtype: int) -> gs.Constant:
    """The constant that hides a slot, of an onnx.TensorProto type."""
    return graph.number(HIDDEN[dtype], dtype)


def length_of(graph: Graph, tensor: gs.Tensor, axis: int, name: str) -> gs.Variable:
    """A tensor's size on an axis, int64 [1]."""
    return graph.new("Shape", [tensor], {"start": axis, "end": axis + 1}, name, np.int64, [1])


def count_up(graph: Graph, length: gs.Tensor, name: str, size: int | str | None = None) -> gs.Variable:
    """0, 1, 2, ... up to a length, int64 [1] or []; `size` is what shapes call it."""
    if rank(length) != 0:
        length = graph.new("Squeeze", [length], name=f"{name}_length", dtype=np.int64, shape=[])
    return graph.new("Range", [graph.int64(0), length, graph.int64(1)], name=name, dtype=np.int64, shape=[size])


def lower_right(graph: Graph, past: gs.Tensor, steps: gs.Tensor, total: gs.Tensor) -> gs.Variable:
    """bool [S, past + S]: slot j is visible to token i where j <= past + i. The lengths come as int64 [1]."""
    step, slots = count_up(graph, steps, "mask/token", "sequence"), count_up(graph, total, "mask/slot", "total")
    own = graph.new("Add", [step, past], name="mask/own_slot", dtype=np.int64, shape=["sequence"])
    own = graph.new("Unsqueeze", [own, graph.int64([1])], name="mask/own_slot", shape=["sequence", 1])
    return graph.new("LessOrEqual", [slots, own], name="mask/causal", dtype=np.bool_, shape=["sequence", "total"])


def own_slots(graph: Graph, write_indices: gs.Tensor) -> gs.Variable:
    """write_indices[b] + i, int64 [B, S]."""
    tokens = graph.input(graph.signature.tokens)
    step = count_up(graph, length_of(graph, tokens, 1, "slots/steps"), "slots/step")
    first = graph.new("Unsqueeze", [write_indices, graph.int64([1])], name="slots/first", shape=["batch", 1])
    return graph.new("Add", [first, step], name="slots/own", shape=["batch", "sequence"])


def all_slots(graph: Graph, past: gs.Variable) -> gs.Variable:
    """0, 1, 2, ... of the static cache `past`, whose shape alone says its capacity: int64 [L]."""
    return count_up(graph, length_of(graph, past, 2, "bias/capacity"), "bias/slots")


def sequence_lengths(graph: Graph) -> gs.Variable:
    """The input that says how many of a step's tokens are valid, int64 [B]."""
    if graph.signature.sequence_lengths is None:
        graph.gs.inputs.append(gs.Variable(SEQUENCE_LENGTHS, np.int64, ["batch"]))
        graph.signature = replace(graph.signature, sequence_lengths=SEQUENCE_LENGTHS)
    return graph.input(graph.signature.sequence_lengths)


def step_bias(graph: Graph, write_indices: gs.Tensor, slots: gs.Tensor, added: gs.Tensor, dtype: int) -> gs.Variable:
    """What is added to scores [B, heads, S, L] where a step's tokens see each other and all before: `added`, and a large
    negative number for slots from write_indices + sequence_lengths on."""
    end = graph.new("Add", [write_indices, sequence_lengths(graph)], name="bias/valid_slots", shape=["batch"])
    end = graph.new("Unsqueeze", [end, graph.int64([1, 2, 3])], name="bias/end")
    visible = graph.new("Less", [slots, end], name="bias/visible", dtype=np.bool_)
    return graph.new("Where", [visible, added, masked_out(graph, dtype)], name="bias/bias", dtype=dtype)


def causal_bias(
    graph: Graph,
    write_indices: gs.Tensor,
    past: gs.Variable,
    dtype: int,
    window: int | None = None,
    slopes: tuple[float, ...] | None = None,
) -> gs.Variable:
    """What is added to scores [B, heads, S, capacity] over the static cache `past`, whose shape alone says its capacity:
    `slopes[head] * (slot - own slot)` (ALiBi, Press et al. 2022; 0 without slopes) where a slot counts, a large negative
    number where not: behind the own slot, or `window` or more slots before it."""
    own = graph.new("Unsqueeze", [own_slots(graph, write_indices), graph.int64([1, 3])], name="bias/own")
    slots = all_slots(graph, past)
    visible = graph.new("LessOrEqual", [slots, own], name="bias/causal", dtype=np.bool_)
    if window is not None:
        before = graph.new("Sub", [own, graph.int64(window)], name="bias/before")
        inside = graph.new("Greater", [slots, before], name="bias/inside", dtype=np.bool_)
        visible = graph.new("And", [visible, inside], name="bias/visible", dtype=np.bool_)
    added: gs.Tensor = graph.number(0, dtype)
    if slopes is not None:
        distance = graph.new("Cast", [graph.new("Sub", [slots, own], name="bias/distance")], {"to": dtype}, dtype=dtype)
        array = np.array(slopes, np.float32).reshape(1, -1, 1, 1)
        weights = gs.Constant(graph.unique("slopes"), array)
        if dtype != TensorProto.FLOAT:
            weights = graph.new("Cast", [weights], {"to": dtype}, name="bias/slopes", dtype=dtype)
        added = graph.new("Mul", [distance, weights], name="bias/alibi", dtype=dtype)
    shape = ["batch", 1 if slopes is None else len(slopes), "sequence", past.shape[2]]
    return graph.new("Where", [visible, added, masked_out(graph, dtype)], name="bias/bias", dtype=dtype, shape=shape)


def both(graph: Graph, first: gs.Tensor, second: gs.Tensor | None) -> gs.Tensor:
    """What is hidden and added, of two masks or one: boolean ones hide where either does, or what the other adds. A slot that
    one hides stays hidden whatever the other adds."""
    if second is None:
        return first
    shape = _broadcast(first, second)
    hiding = [mask for mask in (first, second) if onnx_type(mask) == TensorProto.BOOL]
    if len(hiding) == 2:
        return graph.new("And", hiding, name="mask/visible", dtype=np.bool_, shape=shape)
    if hiding:
        added = second if hiding[0] is first else first
        dtype = onnx_type(added)
        return graph.new("Where", [hiding[0], added, masked_out(graph, dtype)], name="mask/bias", dtype=dtype, shape=shape)
    need(onnx_type(first) == onnx_type(second), "two masks of different types are added")
    return graph.new("Add", [first, second], shape=shape)


def _broadcast(first: gs.Tensor, second: gs.Tensor) -> list | None:
    """The shape of two tensors together; None for a size that is known of neither, or where a rank is not known."""
    if rank(first) is None or rank(second) is None:
        return None
    sizes = zip_longest(reversed(first.shape), reversed(second.shape), fillvalue=1)
    return [b if a == 1 else a if b in (1, a) else None for a, b in sizes][::-1]
