"""What several test files share: tiny-qwen's export and its surgery, made once for all workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_out(tmp_path_factory) -> Path:
    """tiny-qwen's pipeline folder: 4 layers, dynamic NTK; what stages have written so far."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-qwen"


@pytest.fixture(scope="session")
def tiny_export(tiny_out) -> Path:
    """The folder of tiny-qwen's export in float32, weights beside the graph."""
    return once(tiny_out / "export", "export", "--model", "tiny-qwen", "--dtype", "float32")


@pytest.fixture(scope="session")
def tiny_portable(tiny_export, tiny_out) -> Path:
    """The folder of its surgery: a static cache of 640 slots."""
    return once(tiny_out / "surgery", "surgery", tiny_export / "model.onnx", "--capacity", "640")


def once(out: Path, stage: str, *arguments: object) -> Path:
    """Runs a stage that writes `out`, unless another worker has done so."""
    out.parent.mkdir(exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not (out / "manifest.json").is_file():
            command = [sys.executable, "-m", stage, *map(str, arguments), "--out", str(out)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out
