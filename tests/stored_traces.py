"""Graphs as the tracer makes them of some families, stored: to trace one takes longer than all that is done with it later.
`make slow` holds them against fresh ones. python -m tests.stored_traces [NAME-DTYPE ...] makes them anew."""

import gzip
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir
import pytest

from suture.core.parts import find_parts
from suture.export import stage as export_stage
from suture.export.options import ExportOptions
from suture.models.named import checkpoint_folder

FOLDER = Path(__file__).parent / "graphs" / "traced"
STORED = {  # parts, by family and type
    ("gpt2", "float32"): ["decoder"],
    ("qwen3", "bfloat16"): ["decoder"],
    ("whisper", "float32"): ["encoder", "decoder"],
    ("cpmant", "float32"): ["decoder"],
    ("cpmbee", "float32"): ["decoder"],
    ("speech", "float32"): ["encoder", "decoder"],
    ("tiny-qwen", "float32"): ["decoder"],
    ("first-layer", "float16"): ["decoder"],
}


def stored_trace(name: str, dtype: str, part: str) -> ir.Model:
    """As suture.export.trace.trace returns it: weights have no values."""
    proto = stored(name, dtype, part)
    graph = ir.from_proto(proto)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            graph.graph.initializers[tensor.name].const_value = None
    return graph


@contextmanager
def tracing_stored(name: str, dtype: str) -> Iterator[None]:
    """Export takes the stored graphs of this family, where there are any."""
    with pytest.MonkeyPatch.context() as patch:
        if (name, dtype) in STORED:
            patch.setattr(export_stage, "trace", lambda module, _: stored_trace(name, dtype, "decoder"))
            patch.setattr(export_stage, "trace_graph", lambda part, _: stored_trace(name, dtype, part.name))
        yield


def checkpoint(name: str, folder: Path) -> Path:
    from tests import exporting, families, speech

    if name == "tiny-qwen":
        return checkpoint_folder(name)
    if name == "first-layer":
        return exporting.first_layer(folder)
    return speech.write(folder / name) if name == "speech" else families.checkpoint(name, folder)


def export(name: str, dtype: str, work: Path) -> dict[str, onnx.ModelProto]:
    """What export writes for each part, traced anew, without where its weights lie."""
    options = ExportOptions(checkpoint=checkpoint(name, work), dtype=dtype, weights="reference")
    export_stage.export(work / "out", options, pipeline=True)
    graphs = {}
    for part in find_parts(work / "out"):
        graphs[part.name] = onnx.load(part.folder / "export" / "model.onnx", load_external_data=False)
        for tensor in graphs[part.name].graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                del tensor.external_data[:]
    return graphs


def stored(name: str, dtype: str, part: str) -> onnx.ModelProto:
    return onnx.load_model_from_string(gzip.decompress((FOLDER / f"{name}-{dtype}-{part}.onnx.gz").read_bytes()))


def store(name: str, dtype: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    with TemporaryDirectory() as work:
        for part, model in export(name, dtype, Path(work)).items():
            packed = gzip.compress(model.SerializeToString(deterministic=True), 9, mtime=0)
            (FOLDER / f"{name}-{dtype}-{part}.onnx.gz").write_bytes(packed)


if __name__ == "__main__":
    for each in sys.argv[1:] or [f"{name}-{dtype}" for name, dtype in STORED]:
        store(*each.rsplit("-", 1))
