"""Opens decoder graphs in onnxruntime: what they need to be stepped, whatever made them.

To be compared, a graph is computed as it is written, on the CPU; to generate text, as fast as onnxruntime can, also on CUDA.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto

from suture.core.dtypes import HALVES, run_as
from suture.core.errors import UserError
from suture.core.manifest import result
from suture.core.ort_values import from_ort, to_ort
from suture.core.shadow_copy import float32_shadow_copy, has_bfloat16
from suture.core.signature import QUANTIZED, Signature, find_signature
from suture.core.step_inputs import token_values
from suture.core.tensors import tensor_bytes
from suture.core.third_party import leave_attention_to_cudnn
from suture.core.weights import ORT_ROOT_OPTION, load_graph, weights_root
from suture.runtime.decoders import Embed, GrowingDecoder, OfSignature, RowDecoder, StaticDecoder, made_up_constants, step_feeds
from suture.runtime.io_binding import BoundSession, CopyingSession
from suture.runtime.layerwise import LayerwiseSession, is_large, with_fewer_slots, with_products_by_rows

APART = ["MatMulAddFusion"]  # takes the residual sum after a product of one row for a bias; quantised ones then stay unfused
TOKEN_TYPES = {
    TensorProto.INT32: np.int32,
    TensorProto.INT64: np.int64,
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: np.float32,  # copied into bound memory of its type
}
OWN_OPERATORS = "model.ort.onnx"  # what surgery --onnxruntime writes beside model.onnx
HEADROOM = 1.2  # of the weights, for what a session needs beside them


@dataclass(frozen=True)
class OnnxDecoder(OfSignature):
    """A decoder graph in onnxruntime. A bfloat16 graph runs as its float32 shadow copy."""

    name: str
    signature: Signature
    session: ort.InferenceSession | LayerwiseSession = field(repr=False)
    cache_shapes: tuple[tuple[int, int, int], ...]  # of each past input: kv_heads, slots (0 where it grows), head_dim
    encoder_shapes: tuple[tuple[int, int, int], ...]  # of each cache of cross-attention
    vocab: int
    quantised: str | None = None  # the format and options that surgery quantised it with
    rounds: bool = False  # whether it rounds activations or its cache to 8 bits
    device: str = "cpu"  # or "cuda"
    token_type: type = np.int64  # of its token ids or embeddings
    embed: Embed | None = field(repr=False, default=None)  # the model's own, where it takes embeddings
    decoding: Callable[[int], ort.InferenceSession | None] = field(repr=False, default=lambda batch: None)

    @property
    def layerwise(self) -> bool:
        """True if the graph is too large to be loaded at once."""
        return isinstance(self.session, LayerwiseSession)

    def decoder(self, batch: int, noise: bool = True) -> RowDecoder:
        """With `noise`, a static cache begins full of it, cross-attention reads made-up caches, and rows have made-up
        segments where a model is told them."""
        dtype = run_as(self.signature.dtype)
        shapes = [(batch, *shape) for shape in self.cache_shapes]
        if not self.signature.static:
            made = GrowingDecoder(partial(self._forward, not noise), [np.zeros(shape, dtype) for shape in shapes])
        elif self.layerwise:
            copying = CopyingSession(self.session, self.signature, shapes, dtype)
            made = StaticDecoder(copying, self.signature, noise, self._embeds)
        else:
            bound = BoundSession(self.session, self.signature, batch, self.device)
            bound.decoding = self.decoding(batch) or self.session
            made = StaticDecoder(bound, self.signature, noise, self._embeds)
        if noise:
            dtype = run_as(self.dtype)
            made.cross(made_up_constants(self.signature, self.encoder_shapes, batch, dtype))
        return made

    @property
    def _embeds(self) -> Embed | None:
        """Embeddings in the graph's own type."""
        if self.signature.embedding_width is None:
            return None
        embed = self.embed or partial(token_values, self.signature)
        return lambda ids: embed(ids).astype(self.token_type)

    def _forward(self, text, tokens, positions, mask, pasts, alpha, **crossed):
        names = self.signature
        feeds = step_feeds(names, tokens, positions, self._embeds, text) | {names.mask: mask, names.ntk_alpha: alpha}
        feeds = {name: value for name, value in feeds.items() if name is not None}
        feeds |= crossed | {cache.past: past for cache, past in zip(names.caches, pasts)}
        outputs = [names.logits, *(cache.present for cache in names.caches)]
        if self.layerwise:
            logits, *presents = self.session.run(outputs, feeds)
            return logits, presents
        found = self.session.run_with_ort_values(outputs, {name: to_ort(value) for name, value in feeds.items()})
        return found[0].numpy(), [from_ort(present) for present in found[1:]]


def open_graph(path: Path, name: str | None = None, past_pattern: str | None = None) -> OnnxDecoder:
    """Opens an ONNX file. Raises UserError where it is no decoder graph, or onnxruntime cannot load it."""
    return graph_of(load_graph(path), weights_root(path), name or str(path), past_pattern)


def open_embedding(path: Path) -> Embed:
    """A graph that makes embeddings of token ids."""
    graph = load_graph(path)
    session = open_session(graph, weights_root(path), str(path))
    (tokens,) = (value.name for value in session.get_inputs())
    return lambda ids: session.run(None, {tokens: ids.astype(np.int64)})[0]


def open_to_generate(path: Path, device: str) -> OnnxDecoder:
    """The same, computed as fast as onnxruntime can on "cpu" or "cuda": there steps of one token are captured, of the form
    in onnxruntime's own operators where it lies beside the graph, whose kernels are for half precision."""
    model, root = load_graph(path), weights_root(path)
    graph = graph_of(model, root, str(path), device=device, as_written=False)
    if device != "cuda" or not graph.signature.static:
        return graph
    quicker = result(path.parent, OWN_OPERATORS)
    if path.name == "model.onnx" and quicker and graph.signature.dtype in HALVES:
        path, model = quicker, load_graph(quicker)
    return replace(graph, decoding=lambda batch: captured_session(model, root, str(path), batch))


def graph_of(
    model: onnx.ModelProto,
    root: Path,
    name: str,
    past_pattern: str | None = None,
    device: str = "cpu",
    as_written: bool = True,
) -> OnnxDecoder:
    """The same for a graph in memory whose external weights lie under `root`."""
    if as_written and is_large(model):
        model = with_fewer_slots(model)
    signature = find_signature(model, name, past_pattern)
    given = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    refuse_unknown_inputs(given, signature, name)
    if as_written:
        session = open_session(model, root, name)
    else:
        on_gpu = device == "cuda" and signature.static  # a growing cache goes through numpy, which has no bfloat16
        session = fast_session(model if on_gpu else runnable(model), root, name, device)
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
    encoder_shapes = tuple(tuple(shapes[cache.past][1:]) for cache in signature.encoder_caches)
    if not all(isinstance(size, int) for shape in encoder_shapes for size in shape):
        raise UserError(name, "the sizes of its cross-attention's caches are not fixed", "fix all but the batch")
    quantised = next((entry.value for entry in model.metadata_props if entry.key == QUANTIZED), None)
    rounds = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    taken = next(value.type.tensor_type.elem_type for value in model.graph.input if value.name == signature.tokens)
    return OnnxDecoder(
        name, signature, session, tuple(cache_shapes), encoder_shapes, logits[-1], quantised, rounds, device, TOKEN_TYPES[taken]
    )


def open_session(model: onnx.ModelProto, root: Path, name: str) -> ort.InferenceSession | LayerwiseSession:
    """A CPU session that computes a graph as it is written: bfloat16 as float32, no fusion that changes numbers (above
    the basic level onnxruntime quantises the activations of DequantizeLinear + MatMul). Large graphs run by layers."""
    if is_large(model):
        model = with_products_by_rows(model)
        return LayerwiseSession(float32_shadow_copy(model) if has_bfloat16(model) else model, root)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_mem_reuse = all(node.op_type != "MultiHeadAttention" for node in model.graph.node)  # dies in float16
    options.log_severity_level = 4  # fatal: an error also comes as an exception
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # PyTorch computes between its steps
    options.add_session_config_entry(ORT_ROOT_OPTION, str(root))
    return _session(_at_full_accuracy(runnable(model)), options, name, ["CPUExecutionProvider"])


def fast_session(model: onnx.ModelProto, root: Path, name: str, device: str) -> ort.InferenceSession:
    """A session with all of onnxruntime's fusions, but none that rounds activations to int8. On the CPU a large graph's
    weights stay mapped files: slower, but they need not fit into memory."""
    if device == "cuda":
        return cuda_session(model, root, name)
    options = _fast_options(root)
    options.enable_mem_reuse = all(node.op_type != "MultiHeadAttention" for node in model.graph.node)  # dies in float16
    if not is_large(model):
        return _session(model, options, name, ["CPUExecutionProvider"])
    options.add_session_config_entry("session.disable_prepacking", "1")  # a copy of each weight
    options.enable_cpu_mem_arena = False  # it keeps what it once had
    return _session(model, options, name, ["CPUExecutionProvider"], ["ConstantFolding"])  # a float32 copy of bfloat16 ones


def captured_session(model: onnx.ModelProto, root: Path, name: str, batch: int) -> ort.InferenceSession | None:
    """A CUDA session for steps of one token for each of `batch` sequences, which onnxruntime captures as a CUDA graph and
    replays. It holds the weights a second time. None where the GPU's memory does not, or the graph cannot be captured: what
    the CPU computes of an input is not replayed."""
    free, _ = torch.cuda.mem_get_info()
    if free < HEADROOM * weight_bytes(model):
        return None
    try:
        session = cuda_session(model, root, name, captured=(batch, 1))
    except UserError:  # a node that only the CPU can run
        return None
    return session if all(info.name == "Cuda" for info in session.get_input_memory_infos()) else None


def cuda_session(
    model: onnx.ModelProto, root: Path, name: str, captured: tuple[int, int] | None = None
) -> ort.InferenceSession:
    """A session on CUDA. One that is `captured` as a CUDA graph is for this batch and this many tokens a step alone: with
    fixed shapes all arithmetic on them is folded, as capturing needs."""
    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    if attentions and all(_has_keys_for_each_head(node) for node in attentions):
        leave_attention_to_cudnn()
    options = _fast_options(root)
    options.add_session_config_entry("session.qdq_matmulnbits_block_size", "128")  # of int8 weights with a scale an output
    for dim, size in zip(("batch", "sequence"), captured or ()):
        options.add_free_dimension_override_by_name(dim, size)
    ort.preload_dlls()  # the CUDA libraries that torch came with
    cuda = {"arena_extend_strategy": "kSameAsRequested", "enable_cuda_graph": str(int(captured is not None))}
    return _session(model, options, name, [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"], APART)


def _has_keys_for_each_head(attention: onnx.NodeProto) -> bool:
    heads = {attribute.name: attribute.i for attribute in attention.attribute}
    return heads["num_heads"] == heads["kv_num_heads"]


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all weights, inside the file and outside."""
    return sum(tensor_bytes(tensor) for tensor in model.graph.initializer)


def _fast_options(root: Path) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal: an error also comes as an exception
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry(ORT_ROOT_OPTION, str(root))
    return options


def runnable(model: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxruntime's CPU can run: it has no bfloat16 arithmetic."""
    return float32_shadow_copy(model) if has_bfloat16(model) else model


def _session(
    model: onnx.ModelProto, options: ort.SessionOptions, name: str, providers: list, without: list[str] | None = None
) -> ort.InferenceSession:
    """`without`: onnxruntime's optimisations that are left out."""
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=providers, disabled_optimizers=without)
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


def refuse_unknown_inputs(given: Iterable[str], signature: Signature, name: object) -> None:
    """Raises UserError where a graph is given what a decoder's steps do not say."""
    if unknown := sorted(set(given) - signature.inputs):
        raise UserError(name, f"has inputs of unknown meaning: {', '.join(unknown)}", "export it without them")
    if signature.static and signature.mask:
        raise UserError(name, f"has a static cache and a mask input, {signature.mask}", "run surgery on it first")
