"""A graph as what a proof compares."""

from dataclasses import dataclass
from pathlib import Path

import onnx

from suture.core.proof.steps import Runner
from suture.core.signature import Signature


@dataclass(frozen=True)
class Subject:
    """A graph whose external weights lie under `root`."""

    model: onnx.ModelProto
    signature: Signature
    root: Path

    def runner(self, wide: bool, extra: tuple[str, ...] = (), seed: int = 0) -> Runner:
        return Runner(self.model, self.signature, self.root, extra, wide=wide, seed=seed)
