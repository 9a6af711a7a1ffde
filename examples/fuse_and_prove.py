"""My ONNX file, fused and proven: PYTHONPATH=. python examples/fuse_and_prove.py MODEL.onnx [CAPACITY]

Writes portable.onnx (for onnxruntime) and lowered.onnx (for TensorRT) beside the model, whose weights stay where they are.
"""

import sys
from pathlib import Path

import onnx

import suture


def main(model: Path, capacity: int = 2048) -> None:
    operated = suture.operate(model, capacity=capacity)  # raises DifferenceFound where a graph computes something else
    print("nodes:", operated.report.nodes)
    for near_miss in operated.report.unfused:
        print("not fused:", near_miss["node"], near_miss["reason"])
    onnx.save(operated.portable, operated.root / "portable.onnx")
    onnx.save(operated.lowered, operated.root / "lowered.onnx")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
