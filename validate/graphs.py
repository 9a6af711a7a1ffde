"""Opens decoder graphs in onnxruntime: what they need to be stepped, whatever made them."""

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

from contracts.errors import UserError
from contracts.signature import QUANTIZED, Signature, find_signature
from contracts.twin import float32_twin, has_bfloat16
from contracts.weights import ORT_ROOT_OPTION, load_graph, weights_root
from validate.decoders import Decoder, GrowingDecoder, StaticDecoder
from validate.layerwise import LayerwiseSession, is_large, with_fewer_slots, with_products_by_rows

ARRAYS = {  # of caches; a bfloat16 graph runs as its float32 twin
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT8: np.int8,
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
}


@dataclass(frozen=True)
class Graph:
    """A decoder graph in onnxruntime. A bfloat16 graph runs as its float32 twin."""

    name: str
    signature: Signature
    session: ort.InferenceSession | LayerwiseSession = field(repr=False)
    cache_shapes: tuple[tuple[int, int, int], ...]  # of each past input: kv_heads, slots (0 where it grows), head_dim
    vocab: int
    quantised: str | None = None  # the format and options that surgery quantised it with
    rounds: bool = False  # whether it rounds activations or its cache to 8 bits

    @property
    def dtype(self) -> int:
        return self.signature.float_dtype

    @property
    def cache_names(self) -> list[tuple[int, str]]:
        return [(cache.layer, cache.role) for cache in self.signature.caches]

    @property
    def capacity(self) -> int | None:
        return self.signature.capacity

    @property
    def layerwise(self) -> bool:
        """True if the graph is too large to be loaded at once."""
        return isinstance(self.session, LayerwiseSession)

    @property
    def trained_length(self) -> int | None:
        return self.signature.ntk_trained_length

    @property
    def last_only(self) -> bool:
        """True if the graph gives logits for each row's last valid token only."""
        return self.signature.sequence_lengths is not None

    def decoder(self, batch: int) -> Decoder:
        dtype = ARRAYS.get(self.signature.dtype, np.float32)
        shapes = [(batch, *shape) for shape in self.cache_shapes]
        if self.signature.static:
            return StaticDecoder(self._forward_static, self.signature, shapes, dtype)
        return GrowingDecoder(self._forward, [np.zeros(shape, dtype) for shape in shapes])

    def _forward(self, tokens, positions, mask, pasts, alpha):
        names = self.signature
        feeds = {names.tokens: tokens, names.positions: positions, names.mask: mask, names.ntk_alpha: alpha}
        feeds = {name: value for name, value in feeds.items() if name is not None}
        feeds |= {cache.past: past for cache, past in zip(names.caches, pasts)}
        feeds = {name: to_ort(value) for name, value in feeds.items()}
        found = self.session.run_with_ort_values([names.logits, *(cache.present for cache in names.caches)], feeds)
        return found[0].numpy(), [from_ort(present) for present in found[1:]]

    def _forward_static(self, feeds: dict[str, np.ndarray], buffers: list[np.ndarray]) -> np.ndarray:
        if self.layerwise:
            pasts = {cache.past: buffer for cache, buffer in zip(self.signature.caches, buffers)}
            presents = [cache.present for cache in self.signature.caches]
            logits, *written = self.session.run([self.signature.logits, *presents], feeds | pasts)
            for buffer, present in zip(buffers, written):
                buffer[:] = present
            return logits
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        binding.bind_output(self.signature.logits)
        for cache, buffer in zip(self.signature.caches, buffers):
            where = ("cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
            binding.bind_input(cache.past, *where)
            binding.bind_output(cache.present, *where)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()


def open_graph(path: Path, name: str | None = None, past_pattern: str | None = None) -> Graph:
    """Opens an ONNX file. Raises UserError where it is no decoder graph, or onnxruntime cannot load it."""
    return graph_of(load_graph(path), weights_root(path), name or str(path), past_pattern)


def graph_of(model: onnx.ModelProto, root: Path, name: str, past_pattern: str | None = None) -> Graph:
    """The same for a graph in memory whose external weights lie under `root`."""
    if is_large(model):
        model = with_fewer_slots(model)
    signature = find_signature(model, name, past_pattern)
    _refuse_unknown_inputs(model, signature, name)
    session = open_session(model, root, name)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    logits = next(value.shape for value in session.get_outputs() if value.name == signature.logits)
    if not isinstance(logits[-1], int):
        raise UserError(name, f"the vocabulary's size, last dimension of {signature.logits}, is not fixed", "fix it")
    cache_shapes = []
    for cache in signature.caches:
        _, kv_heads, slots, head_dim = shapes[cache.past]
        if not (isinstance(kv_heads, int) and isinstance(head_dim, int)):
            raise UserError(name, f"heads and width of {cache.past} are not fixed", "fix these two dimensions")
        cache_shapes.append((kv_heads, slots if signature.static else 0, head_dim))
    quantised = next((entry.value for entry in model.metadata_props if entry.key == QUANTIZED), None)
    rounds = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return Graph(name, signature, session, tuple(cache_shapes), logits[-1], quantised, rounds)


def open_session(model: onnx.ModelProto, root: Path, name: str) -> ort.InferenceSession | LayerwiseSession:
    """A CPU session that computes a graph as it is written: bfloat16 as float32, no fusion that changes numbers (above
    the basic level onnxruntime quantises the activations of DequantizeLinear + MatMul). Large graphs run by layers."""
    if is_large(model):
        model = with_products_by_rows(model)
        return LayerwiseSession(float32_twin(model) if has_bfloat16(model) else model, root)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_mem_reuse = all(node.op_type != "MultiHeadAttention" for node in model.graph.node)  # dies in float16
    options.log_severity_level = 4  # fatal: an error also comes as an exception
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # PyTorch computes between its steps
    options.add_session_config_entry(ORT_ROOT_OPTION, str(root))
    runnable = _at_full_accuracy(float32_twin(model) if has_bfloat16(model) else model)
    try:
        return ort.InferenceSession(runnable.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no public base
        raise UserError(name, f"onnxruntime cannot load it ({str(error).strip()})", "export it again") from None


def _at_full_accuracy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose MatMulNBits keep their activations in float, which onnxruntime-genai's graphs let them round to int8."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for node in copy.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [each for each in node.attribute if each.name != "accuracy_level"]
            node.ClearField("attribute")
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", 1)])
    return copy


def _refuse_unknown_inputs(model: onnx.ModelProto, signature: Signature, name: str) -> None:
    given = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    known = {signature.tokens, signature.positions, signature.mask, signature.write_indices,
             signature.sequence_lengths, signature.ntk_alpha, *(cache.past for cache in signature.caches)}  # fmt: skip
    if unknown := sorted(given - known):
        raise UserError(name, f"has inputs of unknown meaning: {', '.join(unknown)}", "export it without them")
    if signature.static and signature.mask:
        raise UserError(name, f"has a static cache and a mask input, {signature.mask}", "run surgery on it first")


def to_ort(array: np.ndarray) -> ort.OrtValue:
    """onnxruntime takes no arrays of fp8, but their bytes."""
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), TensorProto.FLOAT8E4M3FN)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def from_ort(value: ort.OrtValue) -> np.ndarray:
    if value.element_type() != TensorProto.FLOAT8E4M3FN:
        return value.numpy()
    data = np.ctypeslib.as_array((ctypes.c_uint8 * value.tensor_size_in_bytes()).from_address(value.data_ptr()))
    return data.copy().view(ml_dtypes.float8_e4m3fn).reshape(value.shape())
