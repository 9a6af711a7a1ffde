"""A graph after a few passes alone, run in onnxruntime and as TensorRT's network."""

from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort

from suture.core.network.evaluate import Evaluator
from suture.core.network.parse import describe
from suture.core.network.runner import to_numpy
from suture.surgery.graph import files


def lowered(model: onnx.ModelProto, folder: Path, *passes: ModuleType) -> tuple[int, onnx.ModelProto, list]:
    """How often the passes matched, what they made of the model, which lies in folder/lowered.onnx, too, and near misses."""
    onnx.save(model, folder / "model.onnx")
    graph, matched = files.read(folder / "model.onnx"), 0
    for each in passes:
        matched += each.run(graph)
        files.remove_unused(graph)
        files.refresh(graph)
    onnx.save(made := files.without_shapes(files.to_model(graph)), folder / "lowered.onnx")
    return matched, made, graph.near_misses


def ran(model: onnx.ModelProto, feeds: dict) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def network(folder: Path, feeds: dict) -> np.ndarray:
    """The first output of TensorRT's network of folder/lowered.onnx."""
    path = folder / "lowered.onnx"
    (value,) = Evaluator(describe(path.read_bytes(), path, folder), "cpu")(feeds).values()
    return to_numpy(value)
