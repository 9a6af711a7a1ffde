"""What a small part of a graph computes, found by running it: for masks and tables whose structure says too little.

A probe is one step of a made-up batch: prompt and cached step, one row and several, padding left, right and in holes.
"""

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from suture.core.sessions import new_session
from suture.core.shadow_copy import runnable
from suture.core.step_inputs import step_values
from suture.surgery.graph import SMALL, Graph, onnx_type, static_dim


@dataclass(frozen=True)
class Probe:
    """One step: `steps` new tokens a row after `past` cached slots, `mask` [batch, past + steps] of real tokens."""

    batch: int
    steps: int
    past: int
    mask: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """int64 [batch, steps]: each token's place among its row's real tokens."""
        return np.maximum(self.mask.cumsum(1) - 1, 0)[:, self.past :]


SHORT = ((2, 3, 4), (1, 1, 5), (3, 4, 0), (2, 2, 9))


def probes(graph: Graph, lengths: tuple[tuple[int, int, int], ...] = SHORT) -> list[Probe]:
    """Probes of the given (batch, steps, past), as far as the graph's own sizes allow, with random padding; the last column
    is always a real token, and so is the whole first row, but in a second probe of each length where there is only one."""
    random = np.random.default_rng(0)
    rows, columns = _fixed_sizes(graph)
    made = []
    for batch, steps, past in lengths:
        batch, steps = rows or batch, columns or steps
        mask = (random.random((batch, past + steps)) > 0.3).astype(np.int64)
        mask[:, -1] = 1
        if rows == 1 and not mask.all():
            made.append(Probe(batch, steps, past, mask.copy()))
        mask[0] = 1
        made.append(Probe(batch, steps, past, mask))
    return made


def _fixed_sizes(graph: Graph) -> tuple[int | None, int | None]:
    """Batch and tokens of a step, where the graph takes no other."""
    tokens = next((tensor for tensor in graph.gs.inputs if tensor.name == graph.signature.tokens), None)
    return (None, None) if tokens is None else (static_dim(tokens, 0), static_dim(tokens, 1))


def evaluate(
    graph: Graph, tensors: list[gs.Tensor], probe: Probe | dict[str, np.ndarray],
    given: dict[str, tuple[gs.Variable, np.ndarray]] | None = None,
) -> list[np.ndarray] | None:  # fmt: skip
    """The tensors' values at a probe, or None where they depend on weights or on what a probe does not say. `given`: inner
    tensors by name whose values are not to be computed."""
    given = given or {}
    nodes = _ancestors(tensors, {id(tensor) for tensor, _ in given.values()})
    if nodes is None:
        return None
    used = {id(tensor) for node in nodes for tensor in node.inputs} | {id(tensor) for tensor in tensors}
    inputs = [tensor for tensor in graph.gs.inputs if id(tensor) in used]
    known = probe if isinstance(probe, dict) else {each.name: _feed(graph, each, probe) for each in inputs}
    feeds = {tensor.name: known.get(tensor.name) for tensor in inputs}
    inputs += [tensor for tensor, _ in given.values()]
    feeds |= {name: values for name, (_, values) in given.items()}
    if any(value is None for value in feeds.values()):
        return None
    if all(tensor.name in feeds for tensor in tensors):
        return [feeds[tensor.name] for tensor in tensors]
    made = gs.Graph(nodes, inputs, [t for t in tensors if t not in inputs], import_domains=graph.gs.import_domains)
    model = gs.export_onnx(made, do_type_check=False)
    for output in model.graph.output:
        if not output.type.WhichOneof("value"):
            output.type.tensor_type.elem_type = onnx.TensorProto.UNDEFINED
    for node in model.graph.node:
        node.name = ""  # need not be unique here, and onnxruntime insists
    model.ir_version = 10
    try:
        session = new_session(runnable(model))
        widened = {name: _widened(value) for name, value in feeds.items()}
        computed = dict(zip([output.name for output in session.get_outputs()], session.run(None, widened)))
    except Exception:  # onnxruntime raises classes of its own; whatever it was, the probe says nothing
        return None
    return [feeds[tensor.name] if tensor.name in feeds else computed[tensor.name] for tensor in tensors]


def _widened(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def _ancestors(tensors: list[gs.Tensor], known: set[int]) -> list[gs.Node] | None:
    """The nodes that the tensors come from, in order, up to those whose ids are `known`; None if a weight is among their
    inputs."""
    seen, ordered = set(), []
    stack = [(node, False) for tensor in tensors for node in tensor.inputs]
    while stack:
        node, done = stack.pop()
        if done:
            ordered.append(node)
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        stack.append((node, True))
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and _is_weight(tensor):
                return None
            stack += [(above, False) for above in tensor.inputs if id(tensor) not in known]
    return ordered


def _is_weight(tensor: gs.Constant) -> bool:
    external = isinstance(tensor._values, LazyValues) and tensor._values.tensor.data_location == onnx.TensorProto.EXTERNAL
    return external or np.prod(tensor.shape, dtype=np.int64) > 16 * SMALL


def _feed(graph: Graph, tensor: gs.Tensor, probe: Probe) -> np.ndarray | None:
    signature = graph.signature
    dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx_type(tensor))
    tokens, past = np.ones((probe.batch, probe.steps), np.int64), np.full(probe.batch, probe.past)
    known = step_values(signature, tokens, probe.positions, np.ones(probe.batch), past)
    if tensor.name in known:
        return known[tensor.name].astype(dtype)
    if tensor.name == signature.mask and len(tensor.shape) == 2:
        return probe.mask.astype(dtype)
    cache = next((cache for cache in signature.caches if cache.past == tensor.name), None)
    if cache is not None and not signature.static:
        sizes = [size if isinstance(size, int) else 1 for size in tensor.shape]
        return np.zeros((probe.batch, sizes[1], probe.past, sizes[3]), dtype)
    return None
