"""A torch decoder to an ONNX graph in the growing signature, without its weights.

The module is traced on memory that is never touched, so a 7B model costs no more than its graph.
"""

import logging
import re
import sys
import warnings
from dataclasses import replace

import onnx_ir as ir
import torch
from onnxscript import optimizer

from suture.core.signature import BIDIRECTIONAL, LEARNED_POSITIONS, NTK_TRAINED_LENGTH, POSITIONS, PREFIX, TOKENS, WANTS_FLOAT32
from suture.export.interface import ExportInterface, decoder_interface, graph_interface
from suture.export.repeat import LayersDiffer, repeat
from suture.export.shallow import KEPT, without_middle
from suture.export.translations import TABLE
from suture.models.dimensions import Dimensions
from suture.models.parts import Part

OPSET = 18  # every operator written out: what any runtime of the last years runs
GROWING = re.compile(r"past_key_values\.\d+\.(decoder\.)?(key|value)$")
TRACED_LAYERS = "suture.traced_layers"
SCOPES = "pkg.torch.onnx.name_scopes"  # where a node came from: all of the tracer's notes that later stages read


def trace(model: torch.nn.Module, dtype: torch.dtype, whole: bool = False) -> ir.Model:
    """Traces a module on device "meta" (see suture.models.families.qwen.Qwen.forward) as ONNX computing in `dtype`.

    Layers that are alike are traced twice and written as often as there are, unless `whole`. Returns a graph whose
    initializers named in the module's state_dict have no values yet; metadata "suture.traced_layers" says how many
    layers the tracer saw.
    """
    dimensions = model.dimensions
    interface = decoder_interface(dimensions, dtype)
    shallow = None if whole else without_middle(model, dimensions.layers)
    if shallow is not None:
        few, blocks = shallow
        graph = _trace(few, decoder_interface(replace(dimensions, layers=KEPT), dtype), dtype)
        try:
            repeat(graph.graph, dimensions.layers, blocks)
            return _finished(graph, interface, KEPT, dimensions)
        except LayersDiffer as difference:  # alike as modules, but not as graphs
            print(f"export: traces each of {dimensions.layers} layers, not two: {difference}", file=sys.stderr)
    return _finished(_trace(model, interface, dtype), interface, dimensions.layers, dimensions)


def trace_graph(part: Part, dtype: torch.dtype) -> ir.Model:
    """The same for a part that has neither cache nor steps, traced as it is."""
    interface = graph_interface(part, dtype)
    graph = _finished(_trace(part.module, interface, dtype), interface)
    if part.wants_float32:
        graph.metadata_props[WANTS_FLOAT32] = "1"
    return graph


def _trace(model: torch.nn.Module, interface: ExportInterface, dtype: torch.dtype) -> ir.Model:
    _give_memory(model, dtype)
    parameters = set(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for chatty in ("torch.onnx", "onnx_ir"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        program = torch.onnx.export(
            model,
            interface.examples,
            input_names=list(interface.inputs),
            output_names=list(interface.outputs),
            dynamic_shapes=interface.dynamic,
            opset_version=OPSET,
            dynamo=True,
            custom_translation_table=TABLE,
            optimize=False,
            verbose=False,
        )
    graph = program.model
    _measure_first_inputs(graph.graph)
    for name in parameters & set(graph.graph.initializers):
        graph.graph.initializers[name].const_value = None  # never written: not to be folded, or merged as equal
    optimizer.optimize_ir(graph)
    return graph


def _give_memory(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Puts the parameters, as `dtype`, on memory of the CPU that nothing touches. Tables that a model keeps beside its
    parameters have their values already, and their type; those that a checkpoint has are on device "meta", too."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                kept = dtype if buffer.is_floating_point() else buffer.dtype
                setattr(module, name, torch.empty_like(buffer, dtype=kept, device="cpu"))
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, dtype=dtype, device="cpu")
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))


def _finished(
    graph: ir.Model, interface: ExportInterface, traced_layers: int | None = None, dimensions: Dimensions | None = None
) -> ir.Model:
    inputs = graph.graph.inputs
    inputs[:] = [value for value in inputs if value.name != POSITIONS or value.uses()]  # a model may not look at them
    _name_axes(graph.graph, interface)
    graph.graph.metadata_props.clear()
    for node in graph.graph:
        for note in set(node.metadata_props) - {SCOPES}:
            del node.metadata_props[note]
    if dimensions is not None and dimensions.ntk_trained_length is not None:
        graph.metadata_props[NTK_TRAINED_LENGTH] = str(dimensions.ntk_trained_length)
    if dimensions is not None and dimensions.positions is not None:
        graph.metadata_props[LEARNED_POSITIONS] = str(dimensions.positions)
    if dimensions is not None and dimensions.bidirectional:
        graph.metadata_props[BIDIRECTIONAL] = "1"
    if dimensions is not None and dimensions.prefix:
        graph.metadata_props[PREFIX] = " ".join(map(str, dimensions.prefix))
    if traced_layers is not None:
        graph.metadata_props[TRACED_LAYERS] = str(traced_layers)
    graph.producer_name = "suture"
    return graph


def _measure_first_inputs(graph: ir.Graph) -> None:
    """Takes batch, sequence and past lengths from the first input that has them; the tracer takes any layer's cache."""
    inputs = {value.name: value for value in graph.inputs}
    cache = next((value for name, value in inputs.items() if GROWING.match(name)), None)
    for node in graph:
        read = node.inputs[0] if node.inputs else None
        if node.op_type == "Shape" and read in inputs.values() and GROWING.match(read.name):
            axis = node.attributes.get_int("start", 0)
            if node.attributes.get_int("end", 4) == axis + 1 and axis in (0, 2):
                node.replace_input_with(0, inputs[TOKENS] if axis == 0 else cache)


def _name_axes(graph: ir.Graph, interface: ExportInterface) -> None:
    """Gives inputs and outputs the interface's axes, and forgets the tracer's names for them inside the graph."""
    for node in graph:
        for value in node.outputs:
            value.shape = None
    shapes = interface.inputs | interface.outputs
    for value in [*graph.inputs, *graph.outputs]:
        value.shape = ir.Shape(shapes[value.name])
