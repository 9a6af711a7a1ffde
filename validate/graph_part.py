"""A part's graphs, each against the one before it: PyTorch, exported, portable, TensorRT's network, the engine.

Of any part that has neither cache nor steps, such as an encoder. What goes in is drawn from the part's own description, and
each output is compared whole.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto

from suture.core.dtypes import HALVES
from suture.core.errors import UserError
from suture.core.manifest import recorded_folder
from suture.core.network.compare import difference
from suture.core.network.evaluate import NotEvaluated
from suture.core.network.inputs import make_noise
from suture.core.network.parse import NoTensorRT
from suture.core.parts import PartFolder
from suture.core.tolerances import REWRITTEN, between_sessions
from suture.core.weights import load_graph
from suture.models.architectures import open_checkpoint
from suture.models.parts import part_named
from suture.runtime import networks
from suture.runtime.engine import Engine, read_description, run_once, why_not
from suture.validate.compare import DIFFERENT, PASSED, Comparison, OutputError, ScenarioResult
from suture.validate.level import TITLES, Level, failed, not_run
from suture.validate.pipeline import NOT_HERE, PartFiles
from suture.validate.reference import load_reference

BATCH = "batch"  # the name of the axis along which rows know nothing of each other

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Runnable:
    """Something that computes the part: its inputs by name, floats as float32, to its outputs by name."""

    name: str
    run: Callable[[Arrays], Arrays]


def graph_level(files: PartFiles, checkpoint: Path | None, tolerance: float | None, seed: int, number: int) -> Level:
    """One of the levels 1 to 4."""
    if number > 1 and (files.portable is None or files.lowered is None):
        return not_run(number, f"surgery has not been run on {files.part.name}/export/model.onnx")
    try:
        dtype, inputs = make_inputs(files.exported, files.part, seed)
        exact = tolerance or between_sessions({dtype})
        if number == 1:
            exported = in_onnxruntime(files.exported, "exported")
            if checkpoint is None:
                return not_run(1, NOT_HERE)
            return _compared(1, in_pytorch(checkpoint, files, dtype), exported, inputs, exact)
        portable = in_onnxruntime(files.portable, "portable")
        if number == 2:
            return _compared(2, in_onnxruntime(files.exported, "exported"), portable, inputs, exact)
        rounded = tolerance or REWRITTEN[dtype]
        if number == 3:
            return _compared(3, portable, in_network(files.lowered), inputs, rounded)
        if files.engine is None:
            return not_run(4, "no engine has been built")
        reason = why_not(_description(files.engine))
        return not_run(4, reason) if reason else _compared(4, portable, in_engine(files.engine), inputs, rounded)
    except (NoTensorRT, NotEvaluated) as error:
        return not_run(number, str(error))
    except UserError as error:
        return failed(number, error)


def _compared(number: int, reference: Runnable, candidate: Runnable, inputs: Arrays, tolerance: float) -> Level:
    comparison = compare_runs(reference, candidate, inputs, tolerance)
    return Level(number, TITLES[number], comparison.status, comparison=comparison)


def compare_runs(reference: Runnable, candidate: Runnable, inputs: Arrays, tolerance: float) -> Comparison:
    """The reference takes row by row, where all inputs have as many, the candidate all at once."""
    started = time.perf_counter()
    count = {len(value) if value.ndim else 0 for value in inputs.values()}
    rows = range(max(count)) if len(count) == 1 and 0 not in count else ()
    alone = [reference.run({name: value[row : row + 1] for name, value in inputs.items()}) for row in rows]
    expected = {name: np.concatenate([each[name] for each in alone]) for name in alone[0]} if alone else reference.run(inputs)
    between = time.perf_counter()
    found = candidate.run(inputs)
    seconds = {reference.name: between - started, candidate.name: time.perf_counter() - between}
    shapes = ", ".join(f"{name} {'×'.join(map(str, value.shape))}" for name, value in inputs.items())
    result = ScenarioResult("random inputs", shapes, PASSED, seconds=seconds)
    for name, values in expected.items():
        compared = difference(name, values, found.get(name))
        result.outputs.append(OutputError(name, compared.error, 0, compared.problem))
        if compared.beyond(tolerance):
            result.status = DIFFERENT
    return Comparison(reference.name, candidate.name, tolerance, [result])


def make_inputs(exported: Path, part: PartFolder, seed: int) -> tuple[int, Arrays]:
    """The onnx.TensorProto type that the part computes in, and values for its inputs that this type can hold, as float32."""
    graph = load_graph(exported)
    below = {name: described["below"] for name, described in part.inputs.items() if "below" in described}
    values = make_noise(graph, seed, below)
    floats = [value.type.tensor_type.elem_type for value in (*graph.graph.input, *graph.graph.output)]
    floats += [tensor.data_type for tensor in graph.graph.initializer]  # of a part whose inputs and outputs are all float32
    dtype = next((kind for kind in floats if kind in HALVES), TensorProto.FLOAT)
    return dtype, {name: value.astype(np.float32) if _is_float(value) else value for name, value in values.items()}


def in_pytorch(checkpoint: Path, files: PartFiles, dtype: int) -> Runnable:
    """The checkpoint's own; its outputs under the exported graph's names."""
    lora = recorded_folder(files.part.folder / "export", "lora")
    module = part_named(load_reference(open_checkpoint(checkpoint, lora), dtype), files.part.name).module
    graph = load_graph(files.exported).graph
    names = [value.name for value in graph.output]

    @torch.inference_mode()
    def run(inputs: Arrays) -> Arrays:
        found = module(*(torch.from_numpy(inputs[value.name]) for value in graph.input))
        return {name: value.numpy() for name, value in zip(names, [found] if isinstance(found, torch.Tensor) else found)}

    return Runnable("PyTorch", run)


def in_onnxruntime(path: Path, name: str) -> Runnable:
    return Runnable(name, networks.in_onnxruntime(path))


def in_network(lowered: Path) -> Runnable:
    """What TensorRT's parser made of the lowered graph. Raises UserError where it refuses."""
    return Runnable("TensorRT's network", networks.in_network(lowered))


def in_engine(path: Path) -> Runnable:
    description = _description(path)
    engine = Engine(path, description, path.parent / description["weights"]["root"])
    return Runnable("engine", lambda inputs: run_once(engine, inputs))


def _description(engine: Path) -> dict:
    try:
        description = read_description(engine.with_name("engine.json"))
        expected, size = description["engine_bytes"], engine.stat().st_size
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = f"what build wrote cannot be read ({type(error).__name__}: {error})"
        raise UserError(engine.parent, what, "run build again") from None
    if size != expected:
        raise UserError(engine, f"has {size} bytes, and was built with {expected}", "run build again")
    return description


def _is_float(value: np.ndarray) -> bool:
    return value.dtype.kind == "f" or value.dtype.name == "bfloat16"
