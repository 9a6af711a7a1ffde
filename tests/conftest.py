"""What several test files share: tiny-qwen's export and its surgery, and a smaller export, made once for all workers."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decoder_graphs import decoder
from exporting import CONFIG, export, traced
from filelock import FileLock
from marks import mark
from parsers import keep_parsers

from suture.export import stage as export_stage
from suture.export.__main__ import main as export_main
from suture.models.random_weights import write
from suture.runtime.graphs import OnnxDecoder
from suture.surgery import __main__ as surgery_stage
from tests.stored_traces import tracing_stored

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    keep_parsers()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items)  # before pytest chooses by marks


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of a run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_out(shared) -> Path:
    """tiny-qwen's pipeline folder: 4 layers, dynamic NTK; what stages have written so far."""
    return shared / "tiny-qwen"


@pytest.fixture(scope="session")
def tiny_export(tiny_out) -> Path:
    """The folder of tiny-qwen's export in float32, weights beside the graph, which was traced before."""
    with tracing_stored("tiny-qwen", "float32"):
        return once(tiny_out / "export", export_main, "--model", "tiny-qwen", "--dtype", "float32")


@pytest.fixture(scope="session")
def tiny_portable(tiny_export, tiny_out) -> Path:
    """The folder of its surgery: a static cache of 640 slots."""
    return once(tiny_out / "surgery", surgery_stage.main, tiny_export / "model.onnx", "--capacity", "640", "--no-verify")


@pytest.fixture(scope="session")
def quantised(tiny_export, tiny_out):
    """The folder of surgery on tiny-qwen with these options, without its proof, a static cache of 64 slots unless another one is
    asked for."""

    def make(*options: str) -> Path:
        out = tiny_out / re.sub(r"\W+", "-", " ".join(("quantised", *options)))
        static = [] if "growing" in options else ["--capacity", "64"]
        with FileLock(f"{out}.lock"):
            line = [str(tiny_export / "model.onnx"), "--out", str(out), "--no-verify", *static, *options]
            assert surgery_stage.main(line) == 0
        return out

    return make


@pytest.fixture(scope="session")
def tiny_own(tiny_export, tiny_out) -> Path:
    """The folder of its surgery with the form in onnxruntime's contrib operators, each pass checked: 32 slots."""
    arguments = [tiny_export / "model.onnx", "--capacity", "32", "--onnxruntime", "--verify"]
    return once(tiny_out / "for-onnxruntime", surgery_stage.main, *arguments)


def once(out: Path, stage: Callable[[list[str]], int], *arguments: object) -> Path:
    """Runs a stage's command, which writes `out`, unless another worker has done so."""
    out.parent.mkdir(exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not (out / "manifest.json").is_file():
            assert stage([*map(str, arguments), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def checkpoint(shared) -> Path:
    """Five layers, float32, in two shards."""
    with FileLock(shared / "checkpoint.lock"):
        if not (shared / "checkpoint" / "config.json").exists():
            write(CONFIG, shared / "checkpoint", "float32", seed=1, shard_bytes=400_000)
    return shared / "checkpoint"


@pytest.fixture(scope="session")
def exported(shared, checkpoint) -> Path:
    with FileLock(shared / "exported.lock"):
        return export(checkpoint, shared / "exported", weights="reference")  # up to date for all workers but the first


@pytest.fixture
def traced_before(exported, monkeypatch) -> None:
    """Makes export use the graph that was traced before: what these tests are about comes after."""
    monkeypatch.setattr(export_stage, "trace", lambda model, dtype: traced(exported, dtype))


@pytest.fixture
def one_thread():
    """Torch on one core, which is faster for small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def growing() -> OnnxDecoder:
    """A small decoder with random weights; `static` is the same one over a static cache."""
    return decoder(static=False)


@pytest.fixture(scope="session")
def static() -> OnnxDecoder:
    return decoder(static=True)
