"""An ONNX file to a Graph at opset 24, and a Graph to an ONNX file. Weights stay where they are: only the graph moves."""

import ast
import re
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx import shape_inference, version_converter
from onnx_graphsurgeon.logger import G_LOGGER

from contracts.errors import UserError
from contracts.signature import Signature, find_signature
from contracts.weights import load_graph, weights_root
from surgery.graph import Graph

OPSET = 24  # TensorScatter, Swish, Attention with nonpad_kv_seqlen
LAST_OPSET_WITH_OTHER_MEANINGS = 17  # reductions take their axes as inputs from 18 on; later changes only add types
IR_VERSION = 11

G_LOGGER.severity = G_LOGGER.ERROR  # graph-surgeon warns of dtypes numpy lacks, which are never touched here


def read(path: Path, past_pattern: str | None = None) -> Graph:
    """Reads the graph of `path`, brought to opset 24, with inferred shapes and nodes named by module path."""
    model = load_graph(path)
    signature = find_signature(model, path, past_pattern)
    _name_by_module(model)
    model = infer_shapes(_upgrade(model, path))
    return Graph(model, signature, weights_root(path))


def write(graph: Graph, path: Path) -> None:
    """Writes the graph, nodes in topological order, with the metadata it came with."""
    model = to_model(graph)
    del model.graph.value_info[:]
    onnx.save(model, path)


def to_model(graph: Graph) -> onnx.ModelProto:
    """The graph as a protobuf; its large weights are references."""
    sort(graph)
    model = gs.export_onnx(graph.gs)
    model.producer_name = "suture"
    model.ir_version = max(model.ir_version, IR_VERSION)
    onnx.helper.set_model_props(model, graph.metadata)
    return model


def reread(graph: Graph, signature: Signature | None = None) -> Graph:
    """The same graph with shapes inferred anew, after passes have changed what they follow from."""
    fresh = Graph(infer_shapes(to_model(graph)), signature or graph.signature, graph.root)
    fresh.near_misses = graph.near_misses
    return fresh


def sort(graph: Graph) -> None:
    """Orders nodes topologically, keeping their present order where it is free (Kahn's algorithm, linear in edges)."""
    waiting = {id(node): len({id(t) for t in node.inputs if t.inputs}) for node in graph.gs.nodes}
    ready = [node for node in reversed(graph.gs.nodes) if waiting[id(node)] == 0]
    ordered = []
    while ready:
        node = ready.pop()
        ordered.append(node)
        for tensor in node.outputs:
            for consumer in {id(consumer): consumer for consumer in tensor.outputs}.values():
                waiting[id(consumer)] -= 1
                if waiting[id(consumer)] == 0:
                    ready.append(consumer)
    assert len(ordered) == len(graph.gs.nodes), "a pass made a cycle"
    graph.gs.nodes = ordered


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """onnx's own inference, with the values of small integer tensors followed through shape arithmetic."""
    return shape_inference.infer_shapes(model, data_prop=True)


def _upgrade(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset > OPSET:
        raise UserError(path, f"opset {opset}", f"export at opset {OPSET} or below")
    if opset <= LAST_OPSET_WITH_OTHER_MEANINGS:
        try:
            return version_converter.convert_version(model, OPSET)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(path, f"opset {opset} does not convert to {OPSET} ({reason})", "export anew") from None
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = OPSET
    return model


def _name_by_module(model: onnx.ModelProto) -> None:
    """Puts the module path that torch's exporter records as metadata, which graph-surgeon drops, into node names."""
    for node in model.graph.node:
        scopes = next((e.value for e in node.metadata_props if e.key == "pkg.torch.onnx.name_scopes"), None)
        if scopes is not None:
            modules = [scope for scope in ast.literal_eval(scopes)[:-1] if re.fullmatch(r"[\w.]+", scope)]
            node.name = "/".join([modules[-1] if modules else "", node.name or node.output[0]])
