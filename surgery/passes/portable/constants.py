"""What follows from constants alone is a constant: Constant nodes, identities, casts to the same type, small arithmetic.

Weights stay where they are: nothing is folded that reads or makes more than 65,536 elements.
"""

import re

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from suture.core.errors import UserError
from suture.core.sessions import new_session
from suture.core.shadow_copy import has_bfloat16, runnable
from suture.core.traits import traits
from suture.surgery.graph import SMALL, Graph, need, onnx_type, operands, producer, rank
from suture.surgery.graph.files import sort

GROWING = ("ConstantOfShape", "Expand", "Range", "Tile")  # a small input does not mean a small output
QUANTISED = ("DequantizeLinear",)  # of a weight that is to stay small
RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")


def run(graph: Graph) -> int:
    matches = graph.match(_inline, graph.nodes("Constant"))
    matches += graph.match(_skip, graph.nodes("Identity", "Cast", "Dropout", "Concat", "Mul"))
    return matches + _fold(graph)


def _inline(graph: Graph, node: gs.Node) -> bool:
    """A Constant node's value, as a constant tensor."""
    name, value = next(iter(node.attrs.items()))
    if name == "value":
        values = value._values if isinstance(value, gs.Constant) else value
    else:
        values = np.array(value, np.float32 if name.startswith("value_float") else np.int64)
    graph.redirect(node.outputs[0], gs.Constant(graph.unique(node.outputs[0].name), values))
    return True


def _skip(graph: Graph, node: gs.Node) -> bool:
    """y = x: a copy, a cast to the same type, a Concat of one tensor, a product with 1."""
    x, y = node.inputs[0], node.outputs[0]
    if node.op == "Concat" and len(node.inputs) > 1:
        return False
    if node.op == "Mul":
        x = next((x for one, x in operands(node) if graph.scalar(one) == 1 and (rank(one) or 0) <= (rank(x) or 0)), None)
        if x is None:
            return False
    if len(node.outputs) > 1 and node.outputs[1].outputs:
        return False
    if node.op == "Dropout" and len(node.inputs) > 2:
        need(graph.scalar(node.inputs[2]) == 0, "its training_mode is not known to be off")
    if node.op == "Cast" and onnx_type(x) != node.attrs["to"]:
        return False
    if graph.is_output(y):
        return _end_in(graph, x, y)
    graph.redirect(y, x)
    return True


def _end_in(graph: Graph, x: gs.Tensor, y: gs.Variable) -> bool:
    """Makes whatever computes x compute y, an output of the graph, itself."""
    source = producer(x)
    if source is None or graph.is_output(x):
        return False
    y.inputs.clear()
    source.outputs = [y if tensor is x else tensor for tensor in source.outputs]
    for node in list(x.outputs):
        node.inputs = [y if tensor is x else tensor for tensor in node.inputs]
    return True


def _fold(graph: Graph) -> int:
    """Runs every node whose inputs are small constants, all at once, and keeps what the rest of the graph reads."""
    sort(graph)
    known: set[int] = set()
    folding: list[gs.Node] = []
    for node in graph.gs.nodes:
        if not _foldable(node) or not all(_small(graph, tensor) or id(tensor) in known for tensor in node.inputs):
            continue
        folding.append(node)
        known |= {id(tensor) for tensor in node.outputs}
    inside = {id(node) for node in folding}
    outputs = [
        tensor
        for node in folding
        for tensor in node.outputs
        if graph.is_output(tensor) or any(id(consumer) not in inside for consumer in tensor.outputs)
    ]
    if not outputs:
        return 0
    part = gs.export_onnx(gs.Graph(folding, [], outputs, import_domains=graph.gs.import_domains), do_type_check=False)
    for number, node in enumerate(part.graph.node):
        node.name = str(number)  # the source's need not be unique, and onnxruntime insists
    part.ir_version = 10
    for tensor, values in zip(outputs, _computed(part, folding)):
        if onnx_type(tensor) == onnx.TensorProto.BFLOAT16:
            values = values.astype(ml_dtypes.bfloat16)
        if values.size <= SMALL and not graph.is_output(tensor):
            proto = onnx.numpy_helper.from_array(values)
            graph.redirect(tensor, gs.Constant(graph.unique(f"{tensor.name}_value"), LazyValues(proto)))
    return len(folding)


def _computed(part: onnx.ModelProto, folding: list[gs.Node]) -> list[np.ndarray]:
    """The values of the part's outputs; bfloat16, which onnxruntime's CPU has few operators for, as float32 where it lacks one."""
    of_bfloat16 = has_bfloat16(part)
    for model in (part, runnable(part))[: 1 + of_bfloat16]:
        try:
            return new_session(model).run(None, {})
        except Exception as error:  # onnxruntime's errors share no public base
            failure = str(error)
    raise _refusal(folding, failure)


def _refusal(folding: list[gs.Node], error: str) -> UserError:
    """The node that onnxruntime cannot compute from the constants that it reads: nothing else could."""
    place = re.search(r"(?:Name:'|Node \()(\d+)\D", error)
    node = folding[int(place[1])] if place and int(place[1]) < len(folding) else folding[0]
    reason = error.strip().splitlines()[0].split(" was false.")[-1].strip()[-200:]
    return UserError(f"{node.op} {node.name}", f"cannot be computed from the constants that it reads ({reason})", "export anew")


def _foldable(node: gs.Node) -> bool:
    subgraphs = any(isinstance(value, gs.Graph) for value in node.attrs.values())
    if not node.outputs:  # what it computed is computed by another now
        return False
    if node.domain or (trait := traits(node.op)) is None or not node.attrs.keys() <= trait.attributes.keys():
        return False  # onnxruntime runs nothing else
    return node.op not in (*GROWING, *QUANTISED, *RANDOM) and not subgraphs


def _small(graph: Graph, tensor: gs.Tensor) -> bool:
    external = (
        isinstance(tensor, gs.Constant)
        and isinstance(tensor._values, LazyValues)
        and tensor._values.tensor.data_location == onnx.TensorProto.EXTERNAL
    )
    return tensor.is_empty() or (not external and graph.constant(tensor) is not None)
