"""A torch decoder to an ONNX graph in the growing signature, without its weights.

The module is traced on memory that is never touched, so a 7B model costs no more than its graph. For the same reason
nothing may look into a parameter while it is optimised: all of them look like zeros, and would be folded or merged.
"""

import logging
import warnings

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch.export import Dim

from contracts.signature import LOGITS, MASK, NTK_ALPHA, NTK_TRAINED_LENGTH, POSITIONS, TOKENS, past_name, present_name
from models import Dimensions

OPSET = 18  # every operator written out: what any runtime of the last years runs
BATCH, SEQUENCE, PAST = 2, 3, 5  # example sizes: different, and neither 0 nor 1, which torch.export would fix


def trace(model: torch.nn.Module, dtype: torch.dtype) -> ir.Model:
    """Traces a module on device "meta" (see models.qwen.Qwen.forward) as ONNX computing in `dtype`.

    Returns a graph whose initializers named in the module's state_dict have no values yet.
    """
    model = model.to(dtype).to_empty(device="cpu")
    dimensions = model.dimensions
    parameters = set(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
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
    optimizer.optimize_ir(graph, should_fold=lambda node: None if _reads_none_of(node, parameters) else False)
    _name_axes(graph.graph, dimensions)
    if dimensions.ntk_trained_length is not None:
        graph.metadata_props[NTK_TRAINED_LENGTH] = str(dimensions.ntk_trained_length)
    graph.producer_name = "suture"
    return graph


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


def _reads_none_of(node: ir.Node, parameters: set[str]) -> bool:
    return not any(value is not None and value.name in parameters for value in node.inputs)


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
