"""Loops: TRIP_LIMIT, RECURRENCE, ITERATOR and LOOP_OUTPUT layers of one loop, and what is computed anew in each iteration.

A recurrence's tensor is its first input in the first iteration, then what its second input was in the iteration before.
An iterator's tensor is a slice of its input. A loop ends when COUNT iterations are done, or WHILE, looked at before each
iteration, is false. LOOP_OUTPUT is the value behind the last iteration, or those of all iterations, stacked.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from suture.core.network.description import Layer, Network
from suture.core.network.dtypes import TORCH

BOUNDARIES = ("TRIP_LIMIT", "RECURRENCE", "ITERATOR", "LOOP_OUTPUT")


@dataclass
class Loop:
    limits: list[Layer] = field(default_factory=list)
    recurrences: list[Layer] = field(default_factory=list)
    iterators: list[Layer] = field(default_factory=list)
    outputs: list[Layer] = field(default_factory=list)
    inner: set[str] = field(default_factory=set)  # tensors that depend on the iteration

    def outer(self) -> list[str]:
        """What must be there before the first iteration."""
        given = [layer.source() for layer in (*self.recurrences, *self.iterators)]
        given += [layer.source() for layer in self.limits if layer.attributes["kind"] == "COUNT"]
        given += [layer.source(1) for layer in self.outputs if len(layer.inputs) > 1]
        return [name for name in given if name not in self.inner]


def find_loops(network: Network) -> dict[str, Loop]:
    """By the name of the loop."""
    kinds = {"TRIP_LIMIT": "limits", "RECURRENCE": "recurrences", "ITERATOR": "iterators", "LOOP_OUTPUT": "outputs"}
    loops: dict[str, Loop] = {}
    for layer in network.layers:
        if layer.type in kinds:
            getattr(loops.setdefault(layer.attributes["loop"], Loop()), kinds[layer.type]).append(layer)
    readers = network.consumers() if loops else {}
    for loop in loops.values():
        ends = {name for layer in loop.outputs for name in layer.outputs}
        waiting = [name for layer in (*loop.recurrences, *loop.iterators) for name in layer.outputs]
        while waiting:
            name = waiting.pop()
            if name not in loop.inner and name not in ends:
                loop.inner.add(name)
                waiting += [output for layer in readers[name] for output in layer.outputs]
    return loops


def run_loop(loop: Loop, network: Network, values: dict, compute: Callable[[list[str], dict], None]) -> dict:
    """The tensors of the loop's outputs. `compute(names, values)` adds tensors to `values`."""
    state = {layer.outputs[0]: values[layer.source()] for layer in loop.recurrences}
    counts = [int(values[layer.source()].item()) for layer in loop.limits if layer.attributes["kind"] == "COUNT"]
    conditions = [layer.source() for layer in loop.limits if layer.attributes["kind"] == "WHILE"]
    stacked = [layer for layer in loop.outputs if layer.attributes["kind"] != "LAST_VALUE"]
    following = [layer.source(1) for layer in loop.recurrences]
    rows: dict[str, list[torch.Tensor]] = {layer.outputs[0]: [] for layer in stacked}
    done = 0
    while not counts or done < min(counts):
        values.update(state)
        for layer in loop.iterators:
            source, axis = values[layer.source()], layer.attributes["axis"]
            place = source.shape[axis] - 1 - done if layer.attributes["reverse"] else done
            values[layer.outputs[0]] = source.select(axis, place)
        compute(conditions, values)
        if not all(values[name].item() for name in conditions):
            break
        compute([*following, *(layer.source() for layer in stacked)], values)
        for layer in stacked:
            rows[layer.outputs[0]].append(values[layer.source()])
        state = {layer.outputs[0]: values[name] for layer, name in zip(loop.recurrences, following)}
        done += 1
        _forget(loop, values)
    _forget(loop, values)
    last = {layer.outputs[0]: state[layer.source()] for layer in loop.outputs if layer not in stacked}
    return last | {layer.outputs[0]: _stack(layer, rows[layer.outputs[0]], network, values) for layer in stacked}


def _forget(loop: Loop, values: dict) -> None:
    for name in loop.inner:
        values.pop(name, None)


def _stack(layer: Layer, rows: list[torch.Tensor], network: Network, values: dict) -> torch.Tensor:
    """As many as input 1 says: TensorRT leaves unsaid what stands where no iteration wrote; here zeros."""
    axis, length = layer.attributes["axis"], int(values[layer.source(1)].item())
    declared = network.tensors[layer.outputs[0]]
    if not rows:
        shape = [max(size, 0) for size in declared.shape]
        shape[axis] = length
        return torch.zeros(shape, dtype=TORCH[declared.dtype])
    rows = rows + [torch.zeros_like(rows[0])] * (length - len(rows))
    return torch.stack(rows[::-1] if layer.attributes["kind"] == "REVERSE" else rows, axis)
