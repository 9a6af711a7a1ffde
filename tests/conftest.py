"""What several test files share: tiny-qwen's export, made once for all workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory) -> Path:
    """The folder of tiny-qwen's export in float32: 4 layers, dynamic NTK, weights beside the graph."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = shared / "tiny-qwen-float32"
    with FileLock(f"{out}.lock"):
        if not (out / "manifest.json").is_file():
            command = [sys.executable, "-m", "export", "--model", "tiny-qwen", "--dtype", "float32", "--out", str(out)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out
