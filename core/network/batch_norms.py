"""What TensorRT's parser makes of a BatchNormalization whose parameters are constants: a SCALE layer that computes x · scale + shift,

    scale = γ / √(variance + ε)        shift = β − mean · scale

both rounded to the parameters' own type. In 16 bits that moves the output by up to 2^-11 of its value: rounding, not another meaning.
So an evaluation in float32 takes them unrounded, if what the layer holds is these values, rounded; else it takes what the layer holds.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
from onnx import numpy_helper

from suture.core.dtypes import BY_ONNX
from suture.core.network.description import Layer, Network, Packed
from suture.core.network.dtypes import Constants, unpack
from suture.core.subgraphs import all_nodes

EPSILON = 1e-5
STEPS = 2.0  # of the type: four roundings of half a step each, of scale, product, difference and the parameters that enter it


def unrounded(network: Network, graph: onnx.ModelProto, constants: Constants) -> Network:
    """The network with float32 parameters in the SCALE layers of BatchNormalization nodes of 16 bits."""
    nodes = {node.output[0]: node for node in all_nodes(graph.graph) if node.op_type == "BatchNormalization"}
    if not nodes:
        return network
    return replace(network, layers=[*_layers(network, nodes, constants)])


def _layers(network: Network, nodes: dict[str, onnx.NodeProto], constants: Constants) -> Iterator[Layer]:
    for layer in network.layers:
        node = nodes.get(layer.outputs[0]) if layer.type == "SCALE" else None
        exact = _exact(node, constants) if node is not None else None
        if exact and all(_rounded(_values(layer.attributes[key]), *exact[key]) for key in exact):
            layer = replace(
                layer, attributes=layer.attributes | {key: values.astype(np.float32) for key, (values, _) in exact.items()}
            )
        yield layer


def _exact(node: onnx.NodeProto, constants: Constants) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """Scale and shift, each with the largest of the terms that were rounded on the way to it; None where a parameter is computed,
    lies outside the file, or is of no 16-bit type."""
    tensors = [constants.tensors[name] for name in node.input[1:5] if name in constants.tensors]
    inside = [tensor for tensor in tensors if tensor.data_location != onnx.TensorProto.EXTERNAL]
    if len(inside) != 4 or not all(BY_ONNX[tensor.data_type].bits == 16 for tensor in inside):
        return None
    gamma, beta, mean, variance = (numpy_helper.to_array(tensor).astype(np.float64) for tensor in tensors)
    epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), EPSILON)
    scale = gamma / np.sqrt(variance + epsilon)
    moved = mean * scale
    return {"scale": (scale, np.abs(scale)), "shift": (beta - moved, np.maximum(np.abs(beta), np.abs(moved)))}


def _values(held) -> np.ndarray | None:
    return unpack(held) if isinstance(held, Packed) else held if isinstance(held, np.ndarray) else None


def _rounded(held: np.ndarray | None, exact: np.ndarray, terms: np.ndarray) -> bool:
    """Whether these are the exact values, but for roundings to their own 16-bit type."""
    if held is None or held.shape != exact.shape or held.dtype.itemsize != 2:
        return False
    spacing = np.spacing(terms.astype(held.dtype)).astype(np.float64)
    return bool((np.abs(held.astype(np.float64) - exact) <= STEPS * spacing).all())
