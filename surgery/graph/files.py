"""An ONNX file to a Graph at opset 24, and a Graph to an ONNX file. Weights stay where they are: only the graph moves."""

import re
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper, shape_inference
from onnx_graphsurgeon.importers.onnx_importer import get_onnx_tensor_dtype, get_onnx_tensor_shape

from suture.core.onnx_checks import onnx_refusals
from suture.core.refusals import BrokenFile
from suture.core.repairs import repair
from suture.core.signature import find_signature
from suture.core.subgraphs import all_graphs
from suture.core.tensors import embed_small, every_tensor, to_raw
from suture.core.weights import load_graph, weights_root
from suture.surgery.graph import Graph
from suture.surgery.graph.branches import take
from suture.surgery.graph.interface import restore, separate
from suture.surgery.graph.opsets import upgrade
from suture.surgery.shapes.foreign_shapes import declare_shapes

IR_VERSION = 11
BYTES = (TensorProto.UINT8, TensorProto.INT8, TensorProto.BOOL)
WRITABLE = ("tensor_type", "sequence_type", "sparse_tensor_type")  # types that graph-surgeon writes
PRODUCER = "suture.surgery"  # export is another


def read(path: Path, past_pattern: str | None = None, given: dict[str, str] | None = None, branch: str | None = None) -> Graph:
    """Reads the graph of `path`, brought to opset 24, with inferred shapes and nodes named by module path."""
    return of_model(load_graph(path, types=False), path, weights_root(path), past_pattern, given, branch)


def of_model(
    model: onnx.ModelProto, name: Path, root: Path, past_pattern: str | None = None, given: dict[str, str] | None = None,
    branch: str | None = None,
) -> Graph:  # fmt: skip
    """The same of a model in memory, which is used up. `name` is for errors; external weights lie under `root`. `branch`: of a
    graph that is one If, the branch to take out (suture.surgery.graph.branches)."""
    embed_small(model, name, root)
    notes = [*take(model, name, branch), *repair(model, name)]
    return of_repaired(model, name, root, past_pattern, given, notes)


def of_repaired(
    model: onnx.ModelProto, name: Path, root: Path, past_pattern: str | None = None, given: dict[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Graph:  # fmt: skip
    """The same of a model that is repaired already; `notes`: what was."""
    to_raw(model)
    signature = find_signature(model, name, past_pattern, need_caches=False, given=given)
    _name_by_module(model)
    with onnx_refusals(name):
        model = upgrade(model, name, with_declared)
        interface = separate(model, [cache.present for cache in signature.caches])
        declare_shapes(model)
        model = infer_shapes(model)
        _check_interface(model)
        graph = Graph(model, signature, root, interface)
    graph.notes = [*notes]
    return graph


def write(graph: Graph, path: Path) -> None:
    """Writes the graph, nodes in topological order, with the metadata it came with."""
    onnx.save(without_shapes(to_model(graph)), path)


def without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the shapes inside it, which the reader infers again."""
    del model.graph.value_info[:]
    return model


def to_model(graph: Graph) -> onnx.ModelProto:
    """The graph as a protobuf, with the source's names for the axes of inputs and outputs; large weights are references."""
    model = inner_model(graph)
    restore(model, graph.interface)
    return model


def inner_model(graph: Graph) -> onnx.ModelProto:
    """The graph as a protobuf in which axes are alike only where the graph makes them so."""
    sort(graph)
    model = gs.export_onnx(graph.gs)
    model.producer_name = PRODUCER
    model.ir_version = max(model.ir_version, IR_VERSION)
    onnx.helper.set_model_props(model, graph.metadata)
    for tensor in every_tensor(model):
        if tensor.int32_data and tensor.data_type in BYTES:  # of which TensorRT's parser takes every byte for a number
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    taken, seen = {node.name for node in model.graph.node}, Counter()
    for node in model.graph.node:  # onnxruntime takes no two names alike
        name = node.name
        seen[name] += 1
        while seen[name] > 1 and node.name in taken:
            node.name = f"{name}_{seen[name]}"
            seen[name] += 1
        taken.add(node.name)
    return model


def refresh(graph: Graph) -> None:
    """Sorts the nodes and, unless all is known, infers types and shapes anew, after a pass has changed the graph."""
    sort(graph)
    if all(_known(tensor) for node in graph.gs.nodes for tensor in node.outputs):
        return
    inferred = infer_shapes(inner_model(graph)).graph
    tensors = {tensor.name: tensor for node in graph.gs.nodes for tensor in node.outputs}
    for value in (*inferred.value_info, *inferred.output):
        if value.name in tensors:
            tensor = tensors[value.name]
            tensor.dtype, tensor.shape = get_onnx_tensor_dtype(value), get_onnx_tensor_shape(value)


def _known(tensor: gs.Variable) -> bool:
    """Whether inference has nothing to add: it calls a size that it cannot follow unk__0 and so on."""
    vague = tensor.dtype is None or tensor.shape is None
    return not vague and not any(size is None or str(size).startswith("unk__") for size in tensor.shape)


def reread(graph: Graph) -> Graph:
    """The same graph again, with shapes inferred anew."""
    fresh = Graph(infer_shapes(inner_model(graph)), graph.signature, graph.root, deepcopy(graph.interface))
    fresh.weights_file, fresh.added = graph.weights_file, graph.added
    return fresh


def remove_unused(graph: Graph) -> None:
    """Removes the nodes that no output of the graph comes from."""
    live: set[int] = set()
    stack = [node for output in graph.gs.outputs for node in output.inputs]
    while stack:
        node = stack.pop()
        if id(node) not in live:
            live.add(id(node))
            stack += _producers(node)
    for node in graph.gs.nodes:
        if id(node) not in live:
            node.inputs.clear()
            node.outputs.clear()
    graph.gs.nodes = [node for node in graph.gs.nodes if id(node) in live]


def sort(graph: Graph) -> None:
    """Orders nodes topologically: each output's nodes, depth first. So the order follows from what the graph computes,
    and not from what was done to it."""
    ours = {id(node) for node in graph.gs.nodes}
    ordered, begun, done = [], set(), set()
    roots = [*(node for output in graph.gs.outputs for node in output.inputs), *graph.gs.nodes]
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, above_done = stack.pop()
        if above_done:
            done.add(id(node))
            ordered.append(node)
        elif id(node) in begun:
            assert id(node) in done, "a pass made a cycle"
        elif id(node) in ours:
            begun.add(id(node))
            stack.append((node, True))
            stack += [(above, False) for above in reversed(_producers(node)) if id(above) not in done]
    graph.gs.nodes = ordered


def _producers(node: gs.Node) -> list[gs.Node]:
    """The nodes that a node reads from, those that its subgraphs read from among them."""
    readers = [node]
    for reader in readers:
        for value in reader.attrs.values():
            if isinstance(value, gs.Graph):
                readers += value.nodes
    return [above for reader in readers for tensor in reader.inputs for above in tensor.inputs]


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """onnx's own inference, with the values of small integer tensors followed through shape arithmetic. Values inside that
    graph-surgeon has no form for (optional ones, maps) are left without a type, and so alone."""
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    for graph in all_graphs(inferred.graph):
        kept = [value for value in graph.value_info if value.type.WhichOneof("value") in WRITABLE]
        if len(kept) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(kept)
    return inferred


def _check_interface(model: onnx.ModelProto) -> None:
    """Raises BrokenFile for an input or output that could not be written again: shapes are inferred, so that what has no type
    now comes from an operator whose types nobody knows."""
    for graph in all_graphs(model.graph):
        for value in (*graph.input, *graph.output):
            kind = value.type.WhichOneof("value")
            if kind is None and graph is model.graph:
                raise BrokenFile(f"{value.name!r} has no type, and none follows from the operator that makes it")
            element = value.type.sequence_type.elem_type if kind == "sequence_type" else value.type
            if kind is not None and element.WhichOneof("value") not in WRITABLE:
                raise BrokenFile(f"{value.name!r} is {kind.removesuffix('_type')}, and inputs and outputs must be tensors")


def with_declared(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all shapes that are known, those of contrib operators' outputs among them."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    declare_shapes(copy)
    return infer_shapes(copy)


def _name_by_module(model: onnx.ModelProto) -> None:
    """Puts the module path that torch's exporter records as metadata, which graph-surgeon drops, into node names."""
    for node in model.graph.node:
        scopes = next((e.value for e in node.metadata_props if e.key == "pkg.torch.onnx.name_scopes"), None)
        if scopes is not None:
            modules = [scope for scope in re.findall(r"'([^']*)'", scopes)[:-1] if re.fullmatch(r"[\w.]+", scope)]
            node.name = "/".join([modules[-1] if modules else "", node.name or node.output[0]])
