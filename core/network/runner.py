"""The parsed network as a Polygraphy runner, for Comparator, RunResults and `polygraphy inspect data`."""

import time
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from suture.core.network.dtypes import NARROW_IN_NUMPY
from suture.core.network.evaluate import Evaluator
from suture.core.network.parse import parse

POLYGRAPHY = {"FLOAT": "FLOAT32", "HALF": "FLOAT16", "BF16": "BFLOAT16", "FP8": "FLOAT8E4M3FN"}


class NetworkRunner(BaseRunner):
    """Parses `model` when activated and evaluates the network at each inference.

    results = Comparator.run([OnnxrtRunner(...), NetworkRunner(Path("model.onnx"))])

    Inputs are numpy arrays or torch tensors. Outputs are numpy arrays, with those of the tensors named in `keep`;
    dtypes that numpy lacks come as float32.
    """

    def __init__(self, model: Path, name: str | None = None, keep: Collection[str] = (), device: str | None = None):
        super().__init__(name=name, prefix="tensorrt-network")
        self.model, self.keep, self.device = Path(model), keep, device
        self.evaluate: Evaluator | None = None

    @property
    def _active(self) -> Evaluator:
        if self.evaluate is None:
            raise RuntimeError(f"{self.name} is not active")
        return self.evaluate

    def activate_impl(self) -> None:
        self.evaluate = Evaluator(parse(self.model), self.device)

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        network = self._active.network
        for name in network.inputs:
            tensor = network.tensors[name]
            dtype = getattr(DataType, POLYGRAPHY.get(tensor.dtype, tensor.dtype))
            metadata.add(name, dtype, tuple(None if size == -1 else size for size in tensor.shape))
        return metadata

    def infer_impl(self, feed_dict: dict) -> OrderedDict:
        started = time.perf_counter()
        evaluate = self._active
        values = evaluate(feed_dict, self.keep)
        self.inference_time = time.perf_counter() - started
        order = dict.fromkeys([*evaluate.network.outputs, *self.keep])
        return OrderedDict((name, to_numpy(values[name])) for name in order if name in values)

    def deactivate_impl(self) -> None:
        self.evaluate = None


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in NARROW_IN_NUMPY else tensor).numpy()
