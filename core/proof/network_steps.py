"""TensorRT's network as what takes steps: evaluated, without a GPU."""

import numpy as np
import onnx

from suture.core.network.evaluate import Evaluator
from suture.core.network.inputs import Feeds
from suture.core.network.runner import to_numpy
from suture.core.proof.steps import Step, Steps
from suture.core.signature import Signature


class NetworkSteps(Steps):
    """`graph`: what `evaluate` has the network of; its signature is that of the portable graph."""

    def __init__(self, evaluate: Evaluator, graph: onnx.ModelProto, signature: Signature):
        super().__init__(graph, signature)
        self.evaluate = evaluate

    def run(self, step: Step | Feeds, extra: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """Every output by its name, and the tensors named in `extra`. Raises EvaluationError."""
        types = self.evaluate.network.tensors
        feeds = {name: _as(types[name].dtype, values) for name, values in self.feeds(step).items() if name in types}
        return {name: to_numpy(value) for name, value in self.evaluate(feeds, extra).items()}

    def read(self, step: Step | Feeds) -> dict[str, np.ndarray]:
        return self.select(step, self.run(step))


def _as(dtype: str, values: np.ndarray) -> np.ndarray:
    """What a network that is evaluated in float32 takes of 16-bit floats."""
    return values.astype(np.float32, copy=False) if dtype == "FLOAT" else values
