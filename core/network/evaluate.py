"""Evaluates a parsed network: each layer in torch, each output checked against what the network declares."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch

from suture.core.dtypes import BY_NUMPY, torch_dtype
from suture.core.errors import UserError
from suture.core.network import arithmetic, attention, elementwise, quantization, sampling, sequences, shapes, windows
from suture.core.network.batch_norms import unrounded
from suture.core.network.description import Layer, Network, Tensor
from suture.core.network.dtypes import TORCH, Constants, to_torch
from suture.core.network.loops import BOUNDARIES, find_loops, run_loop
from suture.core.weights import load_graph

LAYERS: dict[str, Callable] = {
    "ACTIVATION": elementwise.activation,
    "CAST": elementwise.cast,
    "ELEMENTWISE": elementwise.elementwise,
    "IDENTITY": elementwise.identity,
    "PARAMETRIC_RELU": elementwise.parametric_relu,
    "SELECT": elementwise.select,
    "UNARY": elementwise.unary,
    "CONCATENATION": shapes.concatenation,
    "FILL": shapes.fill,
    "GATHER": shapes.gather,
    "NON_ZERO": shapes.non_zero,
    "ONE_HOT": shapes.one_hot,
    "SCATTER": shapes.scatter,
    "SHAPE": shapes.shape,
    "SHUFFLE": shapes.shuffle,
    "SLICE": shapes.slice_,
    "SQUEEZE": shapes.squeeze,
    "UNSQUEEZE": shapes.unsqueeze,
    "CUMULATIVE": arithmetic.cumulative,
    "EINSUM": arithmetic.einsum,
    "MATRIX_MULTIPLY": arithmetic.matrix_multiply,
    "NORMALIZATION": arithmetic.normalization,
    "REDUCE": arithmetic.reduce,
    "SOFTMAX": arithmetic.softmax,
    "TOPK": arithmetic.top_k,
    "CONVOLUTION": windows.convolution,
    "DECONVOLUTION": windows.deconvolution,
    "LRN": windows.lrn,
    "PADDING": windows.padding,
    "POOLING": windows.pooling,
    "SCALE": windows.scale,
    "GRID_SAMPLE": sampling.grid_sample,
    "RESIZE": sampling.resize,
    "NMS": sequences.nms,
    "RAGGED_SOFTMAX": sequences.ragged_softmax,
    "REVERSE_SEQUENCE": sequences.reverse_sequence,
    "DEQUANTIZE": quantization.dequantize,
    "QUANTIZE": quantization.quantize,
    "KV_CACHE_UPDATE": attention.kv_cache_update,
    "ROTARY_EMBEDDING": attention.rotary_embedding,
}
COLLECTIVE = "DIST_COLLECTIVE"  # of several ranks
WIDE = {"HALF": "FLOAT", "BF16": "FLOAT"}
STRUCTURE = (
    "CONSTANT", "ATTENTION_INPUT", "ATTENTION_OUTPUT", "CONDITION", "CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT", "ASSERTION",
    *BOUNDARIES,
)  # fmt: skip


class EvaluationError(UserError):
    """The network cannot be evaluated: a layer of an unknown type, one that fails, or one that yields something else
    than the network declares. Names the layer and its ONNX node."""


class NotEvaluated(EvaluationError):
    """The network has layers of which there is nothing to compute here: unknown ones, and random numbers."""


class Evaluator:
    """Runs a network on inputs.

    evaluate = Evaluator(parse(model))
    outputs = evaluate({"input_ids": ids, ...})                  # {name: torch tensor}
    everything = evaluate(inputs, keep=network.tensors)          # intermediates too

    Constants are checked once against what TensorRT holds. Those outside the ONNX file are mapped when a layer reads them
    and let go after it, so that a model of any size runs; on a CUDA device all of them are copied there once.

    `wide`: in float32 where the network has 16 bits, over the same weights. `check`: whether constants are checked. `graph` and
    the folder `root` of its weights: where the network was parsed of a graph that is in no file. `collective`: what a collective
    layer makes of this rank's value (suture.core.network.lockstep); without it such a layer is not evaluated.
    """

    def __init__(
        self,
        network: Network,
        device: str | None = None,
        wide: bool = False,
        check: bool = True,
        graph: onnx.ModelProto | None = None,
        root: Path | None = None,
        collective: Callable[[Layer, torch.Tensor], torch.Tensor] | None = None,
    ):
        self.collective = collective
        unknown = [layer for layer in network.layers if not (_is_known(layer) or (collective and layer.type == COLLECTIVE))]
        if unknown:
            kinds = ", ".join(sorted({layer.type for layer in unknown}))
            raise NotEvaluated(
                network.model, f"no evaluation of layer type {kinds} (first: {unknown[0]})", "check that part on a GPU"
            )
        self.stored = network.tensors  # the types that constants lie in
        graph = load_graph(network.model) if graph is None else graph
        self.file = Constants(network.model, graph, root)
        self.network = network = unrounded(widened(network), graph, self.file) if wide else network
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.producers = network.producers()
        self.conditions = {
            layer.attributes["conditional"]: layer.source() for layer in network.layers if layer.type == "CONDITION"
        }
        self.attentions = _attentions(network)
        self.loops = find_loops(network)
        self.constants = self._constants(check)

    def __call__(self, feeds: Mapping[str, np.ndarray | torch.Tensor], keep: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """The network's outputs, and the tensors named in `keep` that were computed on the way to them."""
        values = self._inputs(feeds)
        wanted = {*self.network.outputs, *keep}
        asserted = [layer for layer in self.network.layers if layer.type == "ASSERTION"]
        uses = Counter(name for layer in self.network.layers for name in self._sources(layer))

        def release(layer: Layer) -> None:
            for source in self._sources(layer):
                uses[source] -= 1
                if not uses[source] and source not in wanted:
                    values.pop(source, None)

        self._compute([layer.source() for layer in asserted], values)
        for layer in asserted:
            if not values[layer.source()].all():
                raise EvaluationError(self.network.model, f"{layer}: {layer.attributes['message']}", "give other inputs")
        self._compute(self.network.outputs, values, release)
        return {name: value for name, value in values.items() if name in wanted}

    def _compute(self, names: Sequence[str], values: dict, release: Callable[[Layer], None] | None = None) -> None:
        """Adds these tensors to `values`, and what they depend on as long as no `release` takes it out again."""
        pending = list(reversed(names))  # layers are not in topological order
        while pending:
            name = pending[-1]
            if name in values:
                pending.pop()
                continue
            layer = self.producers[name]
            missing = [source for source in self._needed(layer, values) if source not in values]
            if missing:
                pending += reversed(missing)
                continue
            values.update(self._evaluated(layer, values))
            if release is not None:
                release(layer)

    def _sources(self, layer: Layer) -> set[str]:
        """All tensors that `layer` may read."""
        sources = set(layer.sources)
        if layer.type == "ATTENTION_OUTPUT":
            sources |= set(self.attentions[layer.source()].values())
        elif layer.type == "CONDITIONAL_OUTPUT":
            sources.add(self.conditions[layer.attributes["conditional"]])
        return sources

    def _needed(self, layer: Layer, values: dict) -> list[str]:
        """What must be there before `layer` runs: of a conditional first the condition, then the branch it takes."""
        if layer.type == "CONDITIONAL_OUTPUT":
            condition = self.conditions[layer.attributes["conditional"]]
            return [condition] if condition not in values else [layer.source(0 if values[condition].item() else 1)]
        if layer.type == "LOOP_OUTPUT":
            return self.loops[layer.attributes["loop"]].outer()
        return sorted(self._sources(layer))

    def _evaluated(self, layer: Layer, values: dict) -> dict[str, torch.Tensor]:
        try:
            if layer.type == "LOOP_OUTPUT":
                return run_loop(self.loops[layer.attributes["loop"]], self.network, values, self._compute)
            result = self._result(layer, values)
        except EvaluationError:
            raise
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise EvaluationError(
                self.network.model, f"{layer} fails: {reason}", "look at what the parser made of that node"
            ) from error
        parts = result if isinstance(result, tuple) else (result,)
        results = {name: part.to(self.device) for name, part in zip(layer.outputs, parts)}  # a FILL has no inputs' device
        for name, value in results.items():
            self._check(layer, name, value)
        return results

    def _result(self, layer: Layer, values: dict) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if layer.type == "CONSTANT":
            kept = self.constants.get(layer.outputs[0])
            return self._constant(layer) if kept is None else kept
        if layer.type == "CONDITIONAL_OUTPUT":
            return values[self._needed(layer, values)[0]]  # the condition is there, so this is the branch taken
        if layer.type in ("ATTENTION_INPUT", "CONDITIONAL_INPUT"):  # they open a scope; the work is at its end
            return values[layer.source()]
        if layer.type == "ATTENTION_OUTPUT":
            sources = {role: values[name] for role, name in self.attentions[layer.source()].items()}
            query, key, value, mask, lengths = (sources.get(role) for role in ATTENTION_ROLES)
            return attention.attention(layer.attributes["attention"], query, key, value, mask, lengths)
        if layer.type == COLLECTIVE and self.collective is not None:
            return self.collective(layer, values[layer.source()])
        inputs = [None if name is None else values[name] for name in layer.inputs]
        return LAYERS[layer.type](layer, *inputs)

    def _check(self, layer: Layer, name: str, value: torch.Tensor) -> None:
        declared = self.network.tensors[name]
        if not _is_as(declared, value):
            raise EvaluationError(
                self.network.model,
                f"{layer} yields {value.dtype} {list(value.shape)}, "
                f"but the network declares {name} as {declared.dtype} {list(declared.shape)}",
                "one of the two is wrong about this layer",
            )

    def _inputs(self, feeds: Mapping) -> dict[str, torch.Tensor]:
        missing = [name for name in self.network.inputs if name not in feeds]
        if missing:
            raise UserError(self.network.model, f"no value given for {', '.join(missing)}", "give all inputs")
        values = {}
        for name in self.network.inputs:
            declared, value = self.network.tensors[name], feeds[name]
            if not isinstance(value, torch.Tensor) and _dtype_of(value) is None:
                raise UserError(self.network.model, f"input {name} has values of type {value.dtype}", "give numbers")
            tensor = value if isinstance(value, torch.Tensor) else to_torch(value, _dtype_of(value))
            tensor = tensor.float() if tensor.dtype == torch.float64 else tensor  # which TensorRT's parser reads as FLOAT
            if not _is_as(declared, tensor):
                raise UserError(
                    self.network.model,
                    f"input {name} is {declared.dtype} {list(declared.shape)}, "
                    f"but given was {tensor.dtype} {list(tensor.shape)}",
                    "give the input in that form",
                )
            values[name] = tensor.to(self.device)
        return values

    def _constants(self, check: bool) -> dict[str, torch.Tensor]:
        """All constants but those that are mapped anew at each use."""
        kept = {}
        for layer in self.network.layers:
            if layer.type == "CONSTANT":
                value = self._constant(layer, check)
                if self.device.type != "cpu" or not self.file.mapped(layer.attributes["weights"]):
                    kept[layer.outputs[0]] = value.to(self.device)
        return kept

    def _constant(self, layer: Layer, check: bool = False) -> torch.Tensor:
        name = layer.outputs[0]
        value = self.file.load(layer.attributes["weights"], self.stored[name].dtype, check)
        return value.to(TORCH[self.network.tensors[name].dtype])


def widened(network: Network) -> Network:
    """The same network with float32 in the place of 16-bit floats."""
    tensors = {name: replace(tensor, dtype=WIDE.get(tensor.dtype, tensor.dtype)) for name, tensor in network.tensors.items()}
    layers = [
        replace(layer, attributes={**layer.attributes, "to_type": WIDE[target]})
        if (target := layer.attributes.get("to_type")) in WIDE
        else layer
        for layer in network.layers
    ]
    return replace(network, tensors=tensors, layers=layers)


def _is_known(layer: Layer) -> bool:
    random = layer.type == "FILL" and layer.attributes["operation"] != "LINSPACE"
    return not random and (layer.type in LAYERS or layer.type in STRUCTURE)


ATTENTION_ROLES = ("query", "key", "value", "mask", "key_value_lengths")


def _attentions(network: Network) -> dict[str, dict[str, str]]:
    """The sources of each attention by role, found by the tensor that joins its input layer to its output layer."""
    found = {}
    for layer in network.layers:
        if layer.type == "ATTENTION_INPUT":
            given = layer.attributes["attention"]
            optional = {role: given[role] for role in ATTENTION_ROLES[3:] if given[role] is not None}
            found[layer.outputs[0]] = dict(zip(ATTENTION_ROLES[:3], layer.inputs)) | optional
    return found


def _is_as(declared: Tensor, value: torch.Tensor) -> bool:
    """Whether the value has the dtype, the rank and the fixed dimensions of a tensor of the network."""
    fits = len(value.shape) == len(declared.shape) and all(d in (-1, f) for f, d in zip(value.shape, declared.shape))
    return fits and value.dtype == TORCH[declared.dtype]


def _dtype_of(array: np.ndarray) -> torch.dtype | None:
    """None where torch has none: text, lists, uncommon floats."""
    known = BY_NUMPY.get(array.dtype.name)
    return torch_dtype(known) if known and known.torch else None
