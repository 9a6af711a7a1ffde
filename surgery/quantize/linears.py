"""The products with weights in a portable graph: what can be quantised, under which name, and as what."""

from dataclasses import dataclass, field
from fnmatch import fnmatch

import onnx_graphsurgeon as gs
import torch

from suture.core.dtypes import FLOATS
from suture.core.errors import UserError
from suture.surgery.graph import Graph, onnx_type, producer, rank, static_dim
from suture.surgery.quantize.feedback import Feedback

BELOW_LOGITS = ("Reshape", "Cast", "Mul", "Div", "Add", "Tanh")  # what may follow the vocabulary's product


@dataclass(eq=False)
class Linear:
    """y = x @ W + b. What balancing finds is multiplied into the weight when that is rounded:
    W' = diag(columns) W diag(rows), b' = rows · b, both float32 on the weight's inputs and outputs."""

    node: gs.Node
    x: gs.Tensor
    weight: gs.Constant
    bias: gs.Constant | None
    by_output: bool  # the weight lies as [out, in]
    features: int
    outputs: int
    is_head: bool
    columns: torch.Tensor | None = None  # [in]
    rows: torch.Tensor | None = None  # [out]
    feedback: Feedback | None = None  # None: round to the nearest
    rounded: tuple[gs.Constant, gs.Constant] | None = None  # q [in, out] and its scales, once they are
    names: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> int:
        return onnx_type(self.weight)


def find_linears(graph: Graph) -> list[Linear]:
    """Every Gemm and MatMul over a float weight [in, out] or [out, in], in graph order."""
    head = _head(graph)
    found = [_linear(graph, node, node is head) for node in graph.nodes("Gemm", "MatMul")]
    return [linear for linear in found if linear is not None]


def find_tables(graph: Graph) -> list[gs.Node]:
    """The Gathers of rows of a weight by the graph's tokens."""
    tokens = {graph.signature.tokens}
    gathers = [node for node in graph.nodes("Gather") if isinstance(node.inputs[0], gs.Constant)]
    tables = [node for node in gathers if rank(node.inputs[0]) == 2 and onnx_type(node.inputs[0]) in FLOATS]
    return [node for node in tables if node.attrs.get("axis", 0) == 0 and _source(node.inputs[1]) in tokens]


def excluded(linears: list[Linear], patterns: tuple[str, ...]) -> set[int]:
    """ids of those whose node or weight name one of the patterns (with * and ?) matches. Raises UserError for a pattern
    that matches none, since a mistyped one would go unnoticed."""
    chosen = set()
    for pattern in patterns:
        matching = {id(linear) for linear in linears if any(fnmatch(name, pattern) for name in linear.names)}
        if not matching:
            raise UserError(f"--exclude {pattern}", "matches no weight", f"names are like {linears[0].weight.name}")
        chosen |= matching
    return chosen


def _linear(graph: Graph, node: gs.Node, is_head: bool) -> Linear | None:
    x, weight = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    if not isinstance(weight, gs.Constant) or rank(weight) != 2 or onnx_type(weight) not in FLOATS:
        return None
    plain = all(node.attrs.get(name, 1.0) == 1.0 for name in ("alpha", "beta")) and not node.attrs.get("transA", 0)
    if not plain or not (bias is None or isinstance(bias, gs.Constant)):
        return None
    by_output = bool(node.attrs.get("transB", 0))
    outputs, features = (static_dim(weight, axis) for axis in ((0, 1) if by_output else (1, 0)))
    return Linear(node, x, weight, bias, by_output, features, outputs, is_head, names=[weight.name, node.name])


def _head(graph: Graph) -> gs.Node | None:
    """The product whose result the logits are."""
    tensor = next((tensor for tensor in graph.gs.outputs if tensor.name == graph.signature.logits), None)
    while (node := producer(tensor, *BELOW_LOGITS)) is not None:
        tensor = next((each for each in node.inputs if isinstance(each, gs.Variable) and not each.is_empty()), None)
    return producer(tensor, "Gemm", "MatMul")


def _source(tensor: gs.Tensor) -> str:
    while (node := producer(tensor, "Reshape", "Cast", "Identity")) is not None:
        tensor = node.inputs[0]
    return tensor.name
