"""What several test files share: tiny-qwen's export and its surgery, and a smaller export, made once for all workers.

What takes seconds to import is imported by what uses it: pytest-xdist reads this file before it starts its workers, and uses nothing.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from marks import mark

    mark(items)  # before pytest chooses by marks


@pytest.fixture(scope="session", autouse=True)
def parsers() -> None:
    from parsers import keep_parsers

    keep_parsers()


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
    from suture.export.__main__ import main
    from tests.stored_traces import tracing_stored

    with tracing_stored("tiny-qwen", "float32"):
        return once(tiny_out / "export", main, "--model", "tiny-qwen", "--dtype", "float32")


@pytest.fixture(scope="session")
def tiny_portable(tiny_export, tiny_out) -> Path:
    """The folder of its surgery: a static cache of 640 slots."""
    from suture.surgery.__main__ import main

    return once(tiny_out / "surgery", main, tiny_export / "model.onnx", "--capacity", "640", "--no-verify")


@pytest.fixture(scope="session")
def quantised(tiny_export, tiny_out):
    """The folder of surgery on tiny-qwen with these options, without its proof, a static cache of 64 slots unless another one is
    asked for."""
    from suture.surgery.__main__ import main

    def make(*options: str) -> Path:
        out = tiny_out / re.sub(r"\W+", "-", " ".join(("quantised", *options)))
        static = [] if "growing" in options else ["--capacity", "64"]
        with FileLock(f"{out}.lock"):
            line = [str(tiny_export / "model.onnx"), "--out", str(out), "--no-verify", *static, *options]
            assert main(line) == 0
        return out

    return make


@pytest.fixture(scope="session")
def tiny_own(tiny_export, tiny_out) -> Path:
    """The folder of its surgery with the form in onnxruntime's contrib operators, each pass checked: 32 slots."""
    from suture.surgery.__main__ import main

    arguments = [tiny_export / "model.onnx", "--capacity", "32", "--onnxruntime", "--verify"]
    return once(tiny_out / "for-onnxruntime", main, *arguments)


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
    from exporting import CONFIG

    from suture.models.random_weights import write

    with FileLock(shared / "checkpoint.lock"):
        if not (shared / "checkpoint" / "config.json").exists():
            write(CONFIG, shared / "checkpoint", "float32", seed=1, shard_bytes=400_000)
    return shared / "checkpoint"


@pytest.fixture(scope="session")
def exported(shared, checkpoint) -> Path:
    from exporting import export

    with FileLock(shared / "exported.lock"):
        return export(checkpoint, shared / "exported", weights="reference")  # up to date for all workers but the first


@pytest.fixture
def traced_before(exported, monkeypatch) -> None:
    """Makes export use the graph that was traced before: what these tests are about comes after."""
    from exporting import traced

    from suture.export import stage as export_stage

    monkeypatch.setattr(export_stage, "trace", lambda model, dtype: traced(exported, dtype))


@pytest.fixture
def one_thread():
    """Torch on one core, which is faster for small tensors."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def growing():
    """A small decoder with random weights; `static` is the same one over a static cache."""
    from decoder_graphs import decoder

    return decoder(static=False)


@pytest.fixture(scope="session")
def static():
    from decoder_graphs import decoder

    return decoder(static=True)
