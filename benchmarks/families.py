"""The table of graphs in docs/graphs.md: python -m benchmarks.families > docs/graphs.md

For every graph in tests/graphs (made by other exporters from each family; weights from a seed): what surgery fused, the
largest difference of logits and caches through prompts and decoding in onnxruntime, and whether TensorRT-RTX builds it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from tests.graphs import weightless
from tests.test_surgery_families import DECOMPOSED, FUSED, counts, error_between

ROOT = Path(__file__).parents[1]
CAPACITY = 32


def main() -> None:
    print("| graph (family, exporter, opset, type) | nodes | fused | left decomposed | error | engine for 8.9 |")
    print("|---|---|---|---|---|---|")
    for name in weightless.names():
        print(row(name), flush=True)


def row(name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source.onnx", Path(folder) / "out"
        onnx.save(weightless.load(name), source)
        done = stage("surgery", source, "--out", out, "--capacity", CAPACITY)
        if done.returncode:
            return f"| {name} | | {done.stderr.strip()} | | | |"
        before, after = onnx.load(source), onnx.load(out / "model.onnx")
        built = stage("build", out / "model.trt.onnx", "--out", Path(folder) / "build", "--compute-capability", "8.9")
        error = error_between(before, after)
    fused = ", ".join(f"{count} {op}" for op, count in counts(after, FUSED).items())
    left = ", ".join(f"{count} {op}" for op, count in counts(after, DECOMPOSED).items()) or "nothing"
    nodes = f"{len(before.graph.node)} → {len(after.graph.node)}"
    engine = "built" if built.returncode == 0 else built.stderr.strip().splitlines()[-1].replace(folder, "").replace("|", "/")
    return f"| {name} | {nodes} | {fused} | {left} | {error:.1e} | {engine} |"


def stage(name: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", name, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


if __name__ == "__main__":
    main()
