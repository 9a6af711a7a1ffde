"""Opens decoder graphs in onnxruntime: what they need to be stepped, whatever made them.

To be compared, a graph is computed as it is written, on the CPU; to generate text, as fast as onnxruntime can, also on CUDA.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto

from suture.core.as_written import open_session
from suture.core.dtypes import HALVES, run_as
from suture.core.errors import UserError
from suture.core.layerwise import LayerwiseSession, is_large, with_fewer_slots
from suture.core.manifest import result
from suture.core.sessions import CPU, FUSED, NotLoaded, new_session, run_arrays
from suture.core.shadow_copy import runnable
from suture.core.signature import QUANTIZED, Signature, find_signature
from suture.core.step_inputs import Embed, step_values, token_values
from suture.core.tensors import tensor_bytes
from suture.core.third_party import leave_attention_to_cudnn
from suture.core.weights import load_graph, weights_root
from suture.runtime.decoders import GrowingDecoder, OfSignature, RowDecoder, StaticDecoder, made_up_constants
from suture.runtime.io_binding import BoundSession, CopyingSession
from suture.runtime.seen import placed_by

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
        segments where a model takes them."""
        dtype = run_as(self.signature.dtype)
        shapes = [(batch, *shape) for shape in self.cache_shapes]
        placed = placed_by(self.embed, self.signature.position_rows, batch)
        if not self.signature.static:
            made = GrowingDecoder(partial(self._forward, not noise), [np.zeros(shape, dtype) for shape in shapes], placed)
        elif self.layerwise:
            copying = CopyingSession(self.session, self.signature, shapes, dtype)
            made = StaticDecoder(copying, self.signature, noise, self._embeds, placed)
        else:
            bound = BoundSession(self.session, self.signature, batch, self.device)
            bound.decoding = self.decoding(batch) or self.session
            made = StaticDecoder(bound, self.signature, noise, self._embeds, placed)
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
        feeds = step_values(names, tokens, positions, alpha, embed=self._embeds, text=text)
        feeds |= (
            ({names.mask: mask} if names.mask else {})
            | crossed
            | {cache.past: past for cache, past in zip(names.caches, pasts)}
        )
        outputs = [names.logits, *(cache.present for cache in names.caches)]
        if self.layerwise:
            logits, *presents = self.session.run(outputs, feeds)
            return logits, presents
        logits, *presents = run_arrays(self.session, outputs, feeds)
        return logits, presents


def open_graph(path: Path, name: str | None = None, past_pattern: str | None = None) -> OnnxDecoder:
    """Opens an ONNX file. Raises UserError where it is not a decoder graph, or onnxruntime cannot load it."""
    return graph_of(load_graph(path), weights_root(path), name or str(path), past_pattern)


def open_embedding(path: Path) -> Embed:
    """A graph that makes embeddings of token ids."""
    graph = load_graph(path)
    session = open_session(graph, weights_root(path), str(path))
    (tokens,) = (value.name for value in session.get_inputs())
    return lambda ids: session.run(None, {tokens: ids.astype(np.int64)})[0]


def open_to_generate(path: Path, device: str) -> OnnxDecoder:
    """The same, computed as fast as onnxruntime can on "cpu" or "cuda": there steps of one token are captured, of the form
    in onnxruntime's contrib operators where it lies beside the graph, whose kernels are for half precision."""
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


def fast_session(model: onnx.ModelProto, root: Path, name: str, device: str) -> ort.InferenceSession:
    """A session with all of onnxruntime's fusions, but none that rounds activations to int8. On the CPU a large graph's
    weights stay mapped files: slower, but they need not fit into memory."""
    if device == "cuda":
        return cuda_session(model, root, name)
    large = is_large(model)
    without = ["ConstantFolding"] if large else []  # a float32 copy of bfloat16 weights
    return _fast(model, root, name, mapped=large, without=without)


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
    model: onnx.ModelProto,
    root: Path,
    name: str,
    captured: tuple[int, int] | None = None,
    stream: torch.cuda.Stream | None = None,
) -> ort.InferenceSession:
    """A session on CUDA. One that is `captured` as a CUDA graph is for this batch and this many tokens a step alone: with
    fixed shapes all arithmetic on them is folded, as capturing needs. One that computes on a `stream` of torch's is captured by
    whoever captures what that stream does, not by onnxruntime."""
    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    if attentions and all(_has_keys_for_each_head(node) for node in attentions):
        leave_attention_to_cudnn()
    ort.preload_dlls()  # the CUDA libraries that torch came with
    cuda = {"arena_extend_strategy": "kSameAsRequested"}
    cuda |= (
        {"user_compute_stream": str(stream.cuda_stream)} if stream else {"enable_cuda_graph": str(int(captured is not None))}
    )
    return _fast(
        model,
        root,
        name,
        providers=[("CUDAExecutionProvider", cuda), CPU],
        without=APART,
        entries={"session.qdq_matmulnbits_block_size": "128"},  # of int8 weights with a scale an output
        sizes=dict(zip(("batch", "sequence"), captured or ())),
    )


def _has_keys_for_each_head(attention: onnx.NodeProto) -> bool:
    heads = {attribute.name: attribute.i for attribute in attention.attribute}
    return heads["num_heads"] == heads["kv_num_heads"]


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all weights, inside the file and outside."""
    return sum(tensor_bytes(tensor) for tensor in model.graph.initializer)


def _fast(
    model: onnx.ModelProto, root: Path, name: str, entries: Mapping[str, str] | None = None, **how
) -> ort.InferenceSession:
    accurate = {"session.qdq_matmulnbits_accuracy_level": "1", **(entries or {})}
    try:
        return new_session(model, root, level=FUSED, entries=accurate, **how)
    except NotLoaded as error:
        raise UserError(name, f"onnxruntime cannot load it ({error})", "export it again") from None


def refuse_unknown_inputs(given: Iterable[str], signature: Signature, name: object) -> None:
    """Raises UserError where a graph is given what a decoder's steps do not say."""
    if unknown := sorted(set(given) - signature.inputs):
        raise UserError(name, f"has inputs of unknown meaning: {', '.join(unknown)}", "export it without them")
    if signature.static and signature.mask:
        raise UserError(name, f"has a static cache and a mask input, {signature.mask}", "run surgery on it first")
