"""An encoder's graphs, each against the one before it: PyTorch, exported, portable, TensorRT's network.

It has neither cache nor steps. Spectrograms go in, and what comes out are the caches that its decoder's cross-attention
reads: each is compared whole.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto

from suture.core.dtypes import torch_dtype
from suture.core.errors import UserError
from suture.core.network.compare import difference
from suture.core.network.dtypes import TORCH
from suture.core.network.evaluate import Evaluator, NotEvaluated
from suture.core.network.parse import NoTensorRT, parse
from suture.core.network.runner import to_numpy
from suture.core.signature import FEATURES
from suture.core.weights import load_graph, weights_root
from suture.models import open_checkpoint
from suture.runtime.graphs import open_session
from suture.validate.compare import DIFFERENT, PASSED, TOLERANCES, Comparison, OutputError, ScenarioResult
from suture.validate.level import Broken
from suture.validate.reference import load_reference

ROWS = 2
SHADOW_COPIES = {
    TensorProto.BFLOAT16: TOLERANCES[TensorProto.FLOAT]
}  # both sides compute bfloat16 as float32, with the same weights


@dataclass(frozen=True)
class EncoderFiles:
    """Of an encoder-decoder's encoder; None where surgery has not written them."""

    exported: Path
    portable: Path | None
    lowered: Path | None


@dataclass(frozen=True)
class EncoderRun:
    """Something that computes an encoder: float32 spectrograms [B, mel bins, frames] to its outputs by name."""

    name: str
    run: Callable[[np.ndarray], dict[str, np.ndarray]]


def compare_encoder(
    files: EncoderFiles, checkpoint: Path | None, tolerance: float | None, seed: int
) -> Iterator[tuple[int, Comparison | Broken | str]]:
    """The number of each level, from 1 to 3, with what was found, what is broken, or why it could not run."""
    try:
        dtype, features = make_features(files.exported, seed)
        exported = in_onnxruntime(files.exported, "exported")
    except UserError as error:
        yield from ((number, Broken(str(error))) for number in (1, 2, 3))
        return
    allowed = tolerance or SHADOW_COPIES.get(dtype) or TOLERANCES[dtype]
    if checkpoint is None:
        yield 1, "the checkpoint that export/manifest.json names is not here"
    else:
        pytorch = in_pytorch(checkpoint, files.exported, dtype)
        yield 1, compare_encoders(pytorch, exported, features, allowed)
    if files.portable is None or files.lowered is None:
        for number in (2, 3):
            yield number, "surgery has not been run on export/encoder.onnx"
        return
    try:
        portable = in_onnxruntime(files.portable, "portable")
    except UserError as error:
        yield from ((number, Broken(str(error))) for number in (2, 3))
        return
    yield 2, compare_encoders(exported, portable, features, allowed)
    try:
        network = in_network(files.lowered)
    except (NoTensorRT, NotEvaluated) as error:
        yield 3, str(error)
    except UserError as error:
        yield 3, Broken(str(error))
    else:
        yield 3, compare_encoders(portable, network, features, tolerance or TOLERANCES[dtype])


def compare_encoders(reference: EncoderRun, candidate: EncoderRun, features: np.ndarray, tolerance: float) -> Comparison:
    """The reference takes row by row, the candidate the batch."""
    started = time.perf_counter()
    rows = [reference.run(row[None]) for row in features]
    between = time.perf_counter()
    found = candidate.run(features)
    seconds = {reference.name: between - started, candidate.name: time.perf_counter() - between}
    result = ScenarioResult("spectrograms", f"{len(features)} of noise, at once", PASSED, seconds=seconds)
    for name in rows[0]:
        compared = difference(name, np.concatenate([row[name] for row in rows]), found.get(name))
        result.outputs.append(OutputError(name, compared.error, 0, compared.problem))
        if compared.beyond(tolerance):
            result.status = DIFFERENT
    return Comparison(reference.name, candidate.name, tolerance, [result])


def make_features(exported: Path, seed: int) -> tuple[int, np.ndarray]:
    """The onnx.TensorProto type that the encoder computes in, and float32 noise that this type can hold."""
    given = _given(load_graph(exported))
    shape = [ROWS, *(dim.dim_value for dim in given.shape.dim[1:])]
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))
    return given.elem_type, noise.to(torch_dtype(given.elem_type)).float().numpy()


def in_pytorch(checkpoint: Path, exported: Path, dtype: int) -> EncoderRun:
    """The checkpoint's own; its outputs under the exported graph's names."""
    _, encoder = load_reference(open_checkpoint(checkpoint), dtype).parts()
    names = [value.name for value in load_graph(exported).graph.output]

    @torch.inference_mode()
    def run(features: np.ndarray) -> dict[str, np.ndarray]:
        return {name: cache.numpy() for name, cache in zip(names, encoder(torch.from_numpy(features)))}

    return EncoderRun("PyTorch", run)


def in_onnxruntime(path: Path, name: str) -> EncoderRun:
    graph = load_graph(path)
    session = open_session(graph, weights_root(path), str(path))
    names = [output.name for output in session.get_outputs()]
    halves = _given(graph).elem_type == TensorProto.FLOAT16  # a bfloat16 graph runs as its float32 shadow copy

    def run(features: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {FEATURES: features.astype(np.float16) if halves else features})))

    return EncoderRun(name, run)


def in_network(lowered: Path) -> EncoderRun:
    """What TensorRT's parser made of the lowered graph. Raises UserError where it refuses."""
    evaluate = Evaluator(parse(lowered))
    dtype = TORCH[evaluate.network.tensors[FEATURES].dtype]

    def run(features: np.ndarray) -> dict[str, np.ndarray]:
        outputs = evaluate({FEATURES: torch.from_numpy(features).to(dtype)})
        return {name: to_numpy(value) for name, value in outputs.items()}

    return EncoderRun("TensorRT's network", run)


def _given(graph: onnx.ModelProto) -> onnx.TypeProto.Tensor:
    for value in graph.graph.input:
        if value.name == FEATURES:
            return value.type.tensor_type
    raise UserError("encoder", f"has no input {FEATURES}", "export it again")
