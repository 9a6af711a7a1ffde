"""How much memory an engine will take, on the machine that builds it and on the GPU, known before it is built.

The builder's peak is a fit to measured builds: anonymous memory (RssAnon), one profile or two, any type. What it is
made of, as the builder's allocations show:

    0.35 GB           TensorRT itself, and two buffers of 67 MB in which it writes the engine
    8 MB a layer      its graph
    weights           one copy, made when all kernels are chosen; until then they are read where their files are mapped
    what it rewrites  copies of the weights of products that share an input, which become one, and of those of 4 bits
"""

import math
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from suture.build.profiles import Profile
from suture.core.dtypes import FOUR_BITS
from suture.core.errors import UserError
from suture.core.signature import Signature
from suture.core.tensors import stored_size, tensor_bytes

TENSORRT, A_LAYER = 350_000_000, 8_000_000
KERNELS_A_LAYER = 1_000_000  # bytes of code in the engine's file, each profile's
PRODUCTS = ("Gemm", "MatMul")


@dataclass(frozen=True)
class Estimate:
    """Bytes. On the GPU at the largest shapes of the profiles: weights, caches, activations and logits together."""

    builder_peak: int
    engine: int
    weights: int
    caches: int
    activations: int
    logits: int

    @property
    def gpu(self) -> int:
        return self.weights + self.caches + self.activations + self.logits


def estimate(
    proto: onnx.ModelProto, signature: Signature | None, profiles: tuple[Profile, ...], constant: int, bound: int
) -> Estimate:
    """`constant`: bytes of weights inside the engine; `bound`: of those that are its inputs."""
    layers = signature.layers if signature else 0
    rewritten = _rewritten_bytes(proto) if constant >= bound else 0
    peak = TENSORRT + A_LAYER * layers + constant + rewritten
    engine = constant + KERNELS_A_LAYER * max(layers, 1) * max(len(profiles), 1)
    caches, activations, logits = _at_run_time(proto, signature, profiles) if signature else (0, 0, 0)
    return Estimate(math.ceil(peak), engine, constant + bound, caches, activations, logits)


def refuse_what_cannot_fit(model: Path, out: Path, needed: Estimate, as_inputs: bool) -> None:
    """Raises UserError, with the numbers, if the build would run out of memory or of disk."""
    smaller = "take --profiles one or fewer layers" if as_inputs else "take --weights input, which needs a few percent of it"
    free = available_memory()
    if free is not None and needed.builder_peak > free:
        wrong = f"building its engine needs about {_gb(needed.builder_peak)} of memory, and {_gb(free)} are free"
        raise UserError(model, wrong, f"free memory, or {smaller}")
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed.engine > free:
        raise UserError(
            out, f"the engine needs about {_gb(needed.engine)}, and {_gb(free)} are free", f"free space, or {smaller}"
        )


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, as Linux reckons; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _rewritten_bytes(proto: onnx.ModelProto) -> int:
    """Of the weights of products that share an input, which become one, and of those of 4 bits, which are packed anew."""
    weights = {tensor.name: tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    groups = defaultdict(list)
    for node in proto.graph.node:
        if node.op_type in PRODUCTS and node.input[1] in weights:
            groups[node.input[0]].append(tensor_bytes(weights[node.input[1]]))
    packed = sum(tensor_bytes(tensor) for tensor in weights.values() if tensor.data_type in FOUR_BITS)
    return packed + sum(sum(group) for group in groups.values() if len(group) > 1)


def _at_run_time(proto: onnx.ModelProto, signature: Signature, profiles: tuple[Profile, ...]) -> tuple[int, int, int]:
    """Caches, activations and logits at the profiles' largest shapes. Activations: what one layer's products write, the
    mask, and a second layout of one layer's caches, which prompts' attention has made; scores where it is decomposed."""
    values = {value.name: value.type.tensor_type for value in (*proto.graph.input, *proto.graph.output)}
    largest = {name: [max(profile.shapes[name][2][axis] for profile in profiles) for axis in range(len(shapes[2]))]
               for profile in profiles[:1] for name, shapes in profile.shapes.items()}  # fmt: skip
    tokens = math.prod((largest.get(signature.tokens) or _shape(values[signature.tokens]))[:2])
    pasts = [
        (largest.get(cache.past) or _shape(values[cache.past]), values[cache.past].elem_type) for cache in signature.caches
    ]
    caches = sum(math.prod(shape) * stored_size(dtype) for shape, dtype in pasts)
    logits = values[signature.logits]
    vocabulary = logits.shape.dim[-1].dim_value
    slots = pasts[0][0][2]
    width = _product_widths(proto, vocabulary) / max(signature.layers, 1)
    element = stored_size(signature.dtype)
    activations = tokens * (width + slots) * element + caches / max(signature.layers, 1)
    if signature.dtype == TensorProto.FLOAT:  # TensorRT has no fused float32 attention
        heads = max(width / 8 / max(signature.head_dim, 1), signature.kv_heads)
        activations += 2 * tokens * slots * heads * element
    rows = pasts[0][0][0] if signature.last_only else tokens
    return caches, math.ceil(activations), rows * vocabulary * stored_size(logits.elem_type)


def _product_widths(proto: onnx.ModelProto, vocabulary: int) -> int:
    """Elements that all products but the head write for a token."""
    weights = {tensor.name: tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    width = 0
    for node in proto.graph.node:
        if node.op_type in PRODUCTS and node.input[1] in weights:
            rows_first = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            out = weights[node.input[1]].dims[0 if rows_first else 1]
            width += out if out != vocabulary else 0
    return width


def _shape(value: onnx.TypeProto.Tensor) -> list[int]:
    return [max(dim.dim_value, 1) for dim in value.shape.dim]


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
