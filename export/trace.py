"""A torch decoder to an ONNX graph in the growing signature, without its weights.

The module is traced on memory that is never touched, so a 7B model costs no more than its graph.
"""

import logging
import re
import warnings
from dataclasses import replace

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch.export import Dim

from contracts.signature import LOGITS, MASK, NTK_ALPHA, NTK_TRAINED_LENGTH, POSITIONS, TOKENS, past_name, present_name
from export.repeat import LayersDiffer, repeat
from export.shallow import KEPT, without_middle
from models import Dimensions

OPSET = 18  # every operator written out: what any runtime of the last years runs
TRACED_LAYERS = "suture.traced_layers"
BATCH, SEQUENCE, PAST = 2, 3, 5  # example sizes: different, and neither 0 nor 1, which torch.export would fix


SCOPES = "pkg.torch.onnx.name_scopes"  # where a node came from: all of the tracer's notes that later stages read


def trace(model: torch.nn.Module, dtype: torch.dtype, whole: bool = False) -> ir.Model:
    """Traces a module on device "meta" (see models.qwen.Qwen.forward) as ONNX computing in `dtype`.

    Layers that are alike are traced twice and written as often as there are, unless `whole`. Returns a graph whose
    initializers named in the module's state_dict have no values yet; metadata "suture.traced_layers" says how many
    layers the tracer saw.
    """
    layers = model.dimensions.layers
    shallow = None if whole else without_middle(model, layers)
    if shallow is not None:
        few, blocks = shallow
        graph = _trace(few, replace(model.dimensions, layers=KEPT), dtype)
        try:
            repeat(graph.graph, layers, blocks)
            return _finished(graph, model.dimensions, KEPT)
        except LayersDiffer:  # alike as modules, but not as graphs
            pass
    return _finished(_trace(model, model.dimensions, dtype), model.dimensions, layers)


def _trace(model: torch.nn.Module, dimensions: Dimensions, dtype: torch.dtype) -> ir.Model:
    model = model.to(dtype).to_empty(device="cpu")
    parameters = set(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for chatty in ("torch.onnx", "onnx_ir"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        program = torch.onnx.export(
            model,
            _example_inputs(dimensions, dtype),
            input_names=_input_names(dimensions),
            output_names=_output_names(dimensions),
            dynamic_shapes=_dynamic_shapes(dimensions),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    graph = program.model
    _measure_first_inputs(graph.graph)
    for name in parameters & set(graph.graph.initializers):
        graph.graph.initializers[name].const_value = None  # never written: not to be folded, or merged as equal
    optimizer.optimize_ir(graph)
    return graph


def _finished(graph: ir.Model, dimensions: Dimensions, traced_layers: int) -> ir.Model:
    _name_axes(graph.graph, dimensions)
    graph.graph.metadata_props.clear()
    for node in graph.graph:
        for note in set(node.metadata_props) - {SCOPES}:
            del node.metadata_props[note]
    if dimensions.ntk_trained_length is not None:
        graph.metadata_props[NTK_TRAINED_LENGTH] = str(dimensions.ntk_trained_length)
    graph.metadata_props[TRACED_LAYERS] = str(traced_layers)
    graph.producer_name = "suture"
    return graph


def _measure_first_inputs(graph: ir.Graph) -> None:
    """Takes batch, sequence and past lengths from the first input that has them; the tracer takes any layer's cache."""
    inputs = {value.name: value for value in graph.inputs}
    for node in graph:
        read = node.inputs[0] if node.inputs else None
        if node.op_type == "Shape" and read in inputs.values() and re.match(r"past_key_values\.", read.name):
            axis = node.attributes.get_int("start", 0)
            if node.attributes.get_int("end", 4) == axis + 1 and axis in (0, 2):
                node.replace_input_with(0, inputs[TOKENS] if axis == 0 else inputs[past_name(0, "key")])


def _example_inputs(dimensions: Dimensions, dtype: torch.dtype) -> tuple:
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64)
    cache = torch.zeros(BATCH, dimensions.kv_heads, PAST, dimensions.head_dim, dtype=dtype)
    alpha = [] if dimensions.ntk_trained_length is None else [torch.ones(BATCH)]
    return (tokens, tokens.clone(), mask, [cache.clone() for _ in range(2 * dimensions.layers)], *alpha)


def _dynamic_shapes(dimensions: Dimensions) -> tuple:
    rows = {0: Dim.AUTO, 1: Dim.AUTO}
    alpha = [] if dimensions.ntk_trained_length is None else [{0: Dim.AUTO}]
    return (rows, rows, rows, [{0: Dim.AUTO, 2: Dim.AUTO}] * (2 * dimensions.layers), *alpha)


def _input_names(dimensions: Dimensions) -> list[str]:
    caches = [past_name(layer, role) for layer in range(dimensions.layers) for role in ("key", "value")]
    alpha = [] if dimensions.ntk_trained_length is None else [NTK_ALPHA]
    return [TOKENS, POSITIONS, MASK, *caches, *alpha]


def _output_names(dimensions: Dimensions) -> list[str]:
    return [LOGITS, *(present_name(layer, role) for layer in range(dimensions.layers) for role in ("key", "value"))]


def _name_axes(graph: ir.Graph, dimensions: Dimensions) -> None:
    """Gives the dynamic axes the signature's names, and forgets the tracer's names for them inside the graph."""
    for node in graph:
        for value in node.outputs:
            value.shape = None
    total = "past_sequence + sequence"
    for value in [*graph.inputs, *graph.outputs]:
        if value.name in (TOKENS, POSITIONS):
            shape = ["batch", "sequence"]
        elif value.name == MASK:
            shape = ["batch", total]
        elif value.name == NTK_ALPHA:
            shape = ["batch"]
        elif value.name == LOGITS:
            shape = ["batch", "sequence", dimensions.vocab]
        else:
            length = total if value.name.startswith("present") else "past_sequence"
            shape = ["batch", dimensions.kv_heads, length, dimensions.head_dim]
        value.shape = ir.Shape(shape)
