"""The public API. Each function imports what it computes with when it is called."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import onnx

    from suture.core.network.check import CheckResult
    from suture.generate.model import Model
    from suture.runtime.graphs import OnnxDecoder
    from suture.surgery.operate import Operated
    from suture.validate.level import Level

    Source: TypeAlias = onnx.ModelProto | Path | str


def operate(model: Source, *, root: Path | str | None = None, **options: Any) -> Operated:
    """Surgery: fuses a model's graph and makes its KV caches static. The model stays as it is.

    `options` are those of suture.surgery.options.SurgeryOptions: capacity=512, logits="last", verify=True, ... `root` is the folder
    that a model's external weights are relative to (default: the working directory); a file says so itself.

    Returns the portable model (opset 24, standard operators, for onnxruntime), the lowered one (for TensorRT) and the report.
    Weights stay where they are; those that passes make are in the models. Unless no_verify=True, both are proven on small
    inputs, as report.proof has it. Raises UserError for what surgery cannot read or do, suture.core.proof.verdict.DifferenceFound
    where a graph is not what it was made of, and suture.surgery.verification.verify.ChangedOutput where verify=True finds a pass
    that changes an output.
    """
    from suture.surgery.operate import operate, proven
    from suture.surgery.options import SurgeryOptions

    chosen = SurgeryOptions(**options)
    operated = operate(_source(model), chosen, _folder(root))
    if not chosen.no_verify:
        proven(operated, chosen)
    return operated


def check(
    model: Source,
    *,
    root: Path | str | None = None,
    reference: Source | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> CheckResult:
    """What TensorRT's parser makes of a model: what it drops, retypes or misreads, and its network, evaluated without a GPU,
    against onnxruntime on the same model, or on `reference`: one with the same inputs and outputs, where onnxruntime cannot run this
    one (a lowered graph's portable one).

    `tolerance`: of an output's largest value (default: float32 1e-5, float16 1e-2, bfloat16 5e-2). `seed`: of the inputs. Of the
    result, `verdict` is "agrees", "errors", "different", "refused" or "not compared". Raises UserError for what is not a graph, and
    where TensorRT is not installed.
    """
    from suture.core.network.check import check

    folder = _folder(root)
    with _as_file(model, folder) as path, nullcontext() if reference is None else _as_file(reference, folder) as other:
        return check(path, reference=other, tolerance=tolerance, seed=seed)


def compare(a: Source, b: Source, *, root: Path | str | None = None, tolerance: float | None = None, seed: int = 0) -> Level:
    """Two graphs of one model with KV caches, growing or static, in onnxruntime: prompts, chunks, decoding, ragged batches.

    `tolerance`: of the largest logit (default: float32 1e-4, float16 2e-2). Of the result, `status` is "passed" or "different",
    `worst` the largest error, `comparison.scenarios` has all. Raises UserError where one is not a decoder, or they do not pair.
    """
    from suture.validate.levels import compare_graphs

    return compare_graphs(_opened(a, root, "a"), _opened(b, root, "b"), tolerance, seed)


def export_checkpoint(
    checkpoint: Path | str,
    out: Path | str,
    *,
    dtype: str | None = None,
    weights: str | None = None,
    lora: Path | str | None = None,
    force: bool = False,
) -> Path:
    """A checkpoint's folder (config.json and safetensors) as ONNX with its KV cache as inputs and outputs. Returns its file.

    `dtype`: "float32", "float16" or "bfloat16" (default: the checkpoint's own). `weights`: "copy" or "reference" (default:
    copy below 2 GB). `lora`: the folder of an adapter as peft saves it, merged into the weights. What is there already is made
    anew with `force`. Raises UserError for a checkpoint that it cannot read.
    """
    from suture.export.options import ExportOptions
    from suture.export.stage import export

    export(Path(out), ExportOptions(checkpoint=Path(checkpoint), dtype=dtype, weights=weights, lora=_folder(lora)), force)
    return Path(out) / "model.onnx"


def build_engine(
    model: Source, out: Path | str, *, root: Path | str | None = None, force: bool = False, **options: Any
) -> Path:
    """Builds a lowered graph's TensorRT engine into the folder `out`, in a child process. Returns the engine's file; beside it
    lie engine.json, which says what was built, and kernels.json.

    `options` are those of suture.build.options.BuildOptions: compute_capability=("8.9",), max_batch=8, ... Raises UserError where
    the graph cannot be built, or would compute something else, or this machine has too little.
    """
    from suture.build.options import BuildOptions
    from suture.build.stage import ENGINE, build

    with _as_file(model, _folder(root)) as path:
        build(path, Path(out), BuildOptions(**options), force)
    return Path(out) / ENGINE


def open_model(out: Path | str, *, runtime: str = "auto", checkpoint: Path | str | None = None) -> Model:
    """What a pipeline has made in its folder `out`, or one of its graphs, to step and to generate text with.

    `runtime`: "engine", "cuda", "cpu", or "auto" for the first of these that can run here. `checkpoint`: whose tokenizer is
    used (default: the exported one). Raises UserError where there is nothing that can run here.
    """
    from suture.generate.model import open_pipeline

    return open_pipeline(Path(out), runtime, _folder(checkpoint))


def _source(model: Source) -> onnx.ModelProto | Path:
    return Path(model) if isinstance(model, str) else model


def _folder(path: Path | str | None) -> Path | None:
    return None if path is None else Path(path)


def _opened(model: Source, root: Path | str | None, name: str) -> OnnxDecoder:
    from suture.runtime.graphs import graph_of, open_graph

    source = _source(model)
    return open_graph(source) if isinstance(source, Path) else graph_of(source, _folder(root) or Path(), name)


@contextmanager
def _as_file(model: Source, root: Path | None) -> Iterator[Path]:
    """A file of the model, for what reads files: its own, or one that is there for as long as it is needed, with a manifest
    that says where the weights lie and what they are."""
    source = _source(model)
    if isinstance(source, Path):
        yield source
        return
    from tempfile import TemporaryDirectory

    from suture.core.identity import Contents
    from suture.core.tensors import check_places
    from suture.core.weights import weight_files

    with TemporaryDirectory(prefix="suture-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(source.SerializeToString())
        weights, here, contents = (root or Path()).resolve(), os.path.realpath(folder), Contents("weights")
        check_places(source, path, weights)
        manifest = {
            "weights_root": os.path.relpath(weights, here),
            "outputs": {path.name: path.stat().st_size},
            "content": {os.path.relpath(file, here): contents.of(file) for file in weight_files(source, weights)},
        }
        (Path(folder) / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        yield path
