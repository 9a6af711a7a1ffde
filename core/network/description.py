"""A parsed TensorRT network as plain data: what the bindings showed, without the bindings."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """A tensor as the network declares it: dtype by TensorRT's name (HALF, INT64 ...), -1 for a dynamic length."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One layer: `inputs` and `outputs` are tensor names, None for an absent optional input.

    `node` is the ONNX node it was made for, as the parser names it, or None where it does not say.
    `attributes` are those of the layer's TensorRT class: enumerations by member name, dimensions as tuples,
    tensors by name, weights as a `Constant`.
    """

    type: str
    name: str
    node: str | None
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    attributes: dict

    def source(self, place: int = 0) -> str:
        """The tensor that the layer takes at this place, where layers of its type always take one."""
        name = self.inputs[place]
        if name is None:
            raise ValueError(f"{self} has no input {place}")
        return name

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for name in self.inputs if name is not None)

    def __str__(self) -> str:
        origin = f" of ONNX node {self.node}" if self.node and self.node != self.name else ""
        return f"{self.type} layer {self.name}{origin}"


@dataclass(frozen=True)
class Packed:
    """Weights of a dtype that numpy does not have (BF16, FP8, INT4 ...), as the bytes that TensorRT holds."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class WeightReference:
    """Weights that stay in the ONNX file, as its tensor of this name: large ones, and those that nothing shows.

    `checksum` (CRC-32 of the bytes that TensorRT holds) tells whether they are the file's; None where it is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    checksum: int | None


Constant = np.ndarray | Packed | WeightReference


@dataclass(frozen=True)
class Refusal:
    """What the parser says of a node that it does not take. `stopped`: it read no node behind this one."""

    node: str
    operator: str
    message: str
    stopped: bool = False

    def __str__(self) -> str:
        return f"{self.operator or 'graph'} {self.node}: {self.message}"


@dataclass
class Network:
    """`inputs` and `outputs` in the network's order; `messages` is what the parser warned about."""

    model: Path
    tensorrt: str
    layers: list[Layer]
    tensors: dict[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    messages: list[str] = field(default_factory=list)

    def consumers(self) -> dict[str, list[Layer]]:
        """The layers that read each tensor."""
        readers: dict[str, list[Layer]] = {name: [] for name in self.tensors}
        for layer in self.layers:
            for name in layer.sources:
                readers[name].append(layer)
        return readers

    def producers(self) -> dict[str, Layer]:
        """The layer that writes each tensor; network inputs have none."""
        return {name: layer for layer in self.layers for name in layer.outputs}
