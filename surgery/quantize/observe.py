"""What a graph's tensors hold while it reads text: run in onnxruntime a few layers at a time, on the CPU, without torch.

The graph is cut into segments of so many bytes of weights, each a session of its own; between segments only the tensors
that later ones read are kept. So memory depends on the text, not on how deep the model is.
"""

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx import helper
from onnx.external_data_helper import ExternalDataInfo

from suture.core.sessions import new_session
from suture.core.shadow_copy import runnable
from suture.core.signature import ntk_alpha
from suture.core.step_inputs import step_values
from suture.surgery.graph import Graph, is_weight_file, onnx_type
from suture.surgery.graph.files import IR_VERSION, sort
from suture.surgery.graph.weights import under_one_root

SEGMENT = 1 << 26  # bytes of weights; more where one product has more

Values = dict[str, ort.OrtValue]


def observe(
    graph: Graph, wanted: list[gs.Tensor], windows: np.ndarray, segment: int = SEGMENT
) -> Iterator[tuple[gs.Tensor, np.ndarray]]:
    """Yields each wanted tensor once a window, with the float32 values that it has while the graph reads that one of
    `windows`, token ids [windows, tokens], by itself and as a prompt."""
    sort(graph)
    names = {tensor.name for tensor in wanted}
    segments = list(_segments(_needed(graph, wanted), segment))
    known = [_feeds(graph, window) for window in windows]
    for index, nodes in enumerate(segments):
        made = {tensor.name: tensor for node in nodes for tensor in node.outputs}
        read = {tensor.name: tensor for node in nodes for tensor in node.inputs if _computed(tensor)}
        later = {tensor.name for rest in segments[index + 1 :] for node in rest for tensor in node.inputs}
        outputs = [tensor for name, tensor in made.items() if name in later or name in names]
        session = _session(graph, nodes, [tensor for name, tensor in read.items() if name not in made], outputs)
        inputs = [value.name for value in session.get_inputs()]
        for values in known:
            found = session.run_with_ort_values([each.name for each in outputs], {name: values[name] for name in inputs})
            for tensor, value in zip(outputs, found):
                if tensor.name in names:
                    yield tensor, value.numpy().astype(np.float32)
                if tensor.name in later:
                    values[tensor.name] = value
            for name in set(values) - later:
                del values[name]
        del session  # before the next one is made


def _needed(graph: Graph, wanted: list[gs.Tensor]) -> list[gs.Node]:
    """The nodes that the wanted tensors come from, in graph order."""
    found: set[int] = set()
    stack = [node for tensor in wanted for node in tensor.inputs]
    while stack:
        node = stack.pop()
        if id(node) not in found:
            found.add(id(node))
            stack += [above for tensor in node.inputs for above in tensor.inputs]
    return [node for node in graph.gs.nodes if id(node) in found]


def _segments(nodes: list[gs.Node], most: int) -> Iterator[list[gs.Node]]:
    part, size = [], 0
    for node in nodes:
        weights = [ExternalDataInfo(tensor._values.tensor).length or 0 for tensor in node.inputs if is_weight_file(tensor)]
        if part and size + sum(weights) > most:
            yield part
            part, size = [], 0
        part.append(node)
        size += sum(weights)
    if part:
        yield part


def _computed(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Variable) and not tensor.is_empty()


def _session(graph: Graph, nodes: list[gs.Node], inputs: list[gs.Tensor], outputs: list[gs.Tensor]) -> ort.InferenceSession:
    part = gs.Graph(nodes, inputs=inputs, outputs=outputs, opset=graph.gs.opset, import_domains=graph.gs.import_domains)
    model = gs.export_onnx(part, do_type_check=False)
    model.ir_version = IR_VERSION
    for node in model.graph.node:
        node.name = ""  # need not be unique here, and onnxruntime insists
    root = under_one_root(model, graph.root, graph.added)
    return new_session(runnable(model), root, mapped=True)


def _feeds(graph: Graph, window: np.ndarray) -> Values:
    """A prompt of one row, over an empty cache."""
    names, steps = graph.signature, len(window)
    trained = names.ntk_trained_length
    alpha = np.full(1, ntk_alpha(steps, trained) if trained else 1.0)
    known = step_values(names, window[None], np.arange(steps)[None], alpha, np.zeros(1), np.full(1, steps))
    if names.mask:
        known[names.mask] = np.ones((1, steps))
    values: Values = {}
    for tensor in graph.gs.inputs:
        dtype = onnx_type(tensor)
        dtype = onnx.TensorProto.FLOAT if dtype == onnx.TensorProto.BFLOAT16 else dtype
        array = known.get(tensor.name)
        if array is None:  # a cache
            array = np.zeros((1, *(int(size) if isinstance(size, int | np.integer) else 0 for size in tensor.shape[1:])))
        values[tensor.name] = ort.OrtValue.ortvalue_from_numpy(array.astype(helper.tensor_dtype_to_np_dtype(dtype)))
    return values
