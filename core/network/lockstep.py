"""Networks of several ranks evaluated together: at a collective layer each waits for the others and takes the sum."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import torch

from suture.core.network.description import Layer, Network
from suture.core.network.evaluate import EvaluationError, Evaluator

Values = Mapping[str, np.ndarray | torch.Tensor]
PATIENCE = 600  # seconds that a rank waits for another one


class _LeftAlone(EvaluationError):
    """Another rank has failed."""


class Lockstep:
    """`networks` of all ranks, in order, each parsed of the graph beside it in `graphs`, whose weights lie under `root`.

    outputs = Lockstep(networks, graphs, root)([{"input_ids": ids, ...}, ...])     # one dictionary a rank
    """

    def __init__(self, networks: Sequence[Network], graphs: Sequence[onnx.ModelProto], root: Path, wide: bool = False):
        self.barrier = threading.Barrier(len(networks))
        self.nodes = {node.name: node for node in graphs[0].graph.node}
        self.places: list[tuple[str, torch.Tensor] | None] = [None] * len(networks)
        self.evaluators = [
            Evaluator(network, "cpu", wide, check=False, graph=graph, root=root, collective=self._of_rank(rank))
            for rank, (network, graph) in enumerate(zip(networks, graphs))
        ]

    def __call__(self, feeds: Sequence[Values]) -> list[dict[str, torch.Tensor]]:
        """Raises EvaluationError: what one rank fails at, or that they do not wait for the same collective."""
        self.barrier.reset()
        with ThreadPoolExecutor(len(self.evaluators)) as pool:
            running = [pool.submit(self._run, each, values) for each, values in zip(self.evaluators, feeds)]
        errors = [error for each in running if (error := each.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, _LeftAlone)):
            raise error  # that of the rank that failed
        return [each.result() for each in running]

    def _run(self, evaluate: Evaluator, values: Values) -> dict[str, torch.Tensor]:
        try:
            return evaluate(values)
        except BaseException:
            self.barrier.abort()
            raise

    def _of_rank(self, rank: int) -> Callable[[Layer, torch.Tensor], torch.Tensor]:
        def collective(layer: Layer, value: torch.Tensor) -> torch.Tensor:
            self.places[rank] = (layer.name, value)
            try:
                self.barrier.wait(PATIENCE)
                there = [place for place in self.places if place is not None]
                self.barrier.wait(PATIENCE)  # all have read before the next one writes
            except threading.BrokenBarrierError:
                raise _LeftAlone("ranks", f"another rank never came to {layer}", "see what it failed at") from None
            if {name for name, _ in there} != {layer.name}:
                names = ", ".join(sorted({name for name, _ in there}))
                raise EvaluationError("ranks", f"wait for different collectives: {names}", "make all ranks' graphs anew")
            return self._combined(layer, [value for _, value in there])

        return collective

    def _combined(self, layer: Layer, values: list[torch.Tensor]) -> torch.Tensor:
        """What a collective layer gives every rank, of the values of all in rank order: the sum, added up in float32 and rounded
        once. TensorRT's layer does not say what it does, so that is read off its node."""
        node = self.nodes.get(layer.node or "")
        said = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute} if node is not None else {}
        kind, ranks = [said.get(name, b"").decode() for name in ("collective_operation", "reduce_op")], said.get("nb_rank")
        if kind != ["all_reduce", "sum"] or ranks != len(values):
            what = f"{layer} is {' '.join(kind) or 'unknown'} of {ranks} ranks"
            raise EvaluationError("ranks", what, f"all_reduce sum of {len(values)} is evaluated here")
        return torch.stack([value.float() for value in values]).sum(0).to(values[0].dtype)
