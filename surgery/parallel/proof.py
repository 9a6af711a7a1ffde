"""That the ranks together compute what the graph computes that was divided: the joint graph against it in onnxruntime, and the
networks that TensorRT's parser makes of the ranks' lowered graphs, evaluated in lock step, against it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from suture.core.errors import UserError
from suture.core.network.inputs import Feeds
from suture.core.network.parse import NoTensorRT, shared_parser
from suture.core.proof.cases import make_cases
from suture.core.proof.differences import relative_error
from suture.core.proof.prove import EXACT, NO_TENSORRT, compare_two
from suture.core.proof.steps import Step, Steps, Unrunnable
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import DIFFERENT, FAILED, FLOAT32, PASSED, DtypeComparison, PairVerdict, Proof, StepErrors
from suture.surgery.parallel.division import Division
from suture.surgery.parallel.placement import Placement

Outputs = dict[str, np.ndarray]
SECONDS = 20  # from which no further step is begun


def prove_ranks(whole: Subject, joint: Subject, ranks: Sequence[Subject], division: Division) -> Proof:
    """`ranks`: the lowered graphs."""
    started = time.monotonic()
    pairs = [compare_two(whole, joint), _networks(whole, ranks, division)]
    return Proof(pairs, round(time.monotonic() - started, 3))


def _networks(whole: Subject, ranks: Sequence[Subject], division: Division) -> PairVerdict:
    try:
        networks = [
            shared_parser().parse(Path(f"rank{rank}.trt.onnx"), each.model, each.root) for rank, each in enumerate(ranks)
        ]
    except NoTensorRT:
        return PairVerdict(3, reason=NO_TENSORRT)
    except UserError as error:
        return PairVerdict(3, FAILED, error.parts[1])
    from suture.core.network.evaluate import EvaluationError, NotEvaluated  # only here: torch takes seconds
    from suture.core.network.lockstep import Lockstep

    found = PairVerdict(3, PASSED, comparisons=[DtypeComparison(FLOAT32, EXACT)])
    try:
        lockstep = Lockstep(networks, [each.model for each in ranks], ranks[0].root, wide=True)
    except NotEvaluated as unknown:
        return PairVerdict(3, reason=unknown.parts[1])
    together = RankSteps(lambda feeds: lockstep(feeds), [set(each.inputs) for each in networks], whole, ranks[0], division)
    runner, started = whole.runner(wide=True), time.monotonic()
    for case in make_cases(whole.model, whole.signature, whole.model, whole.signature):
        if found.comparisons[0].steps and time.monotonic() > started + SECONDS:
            found.left_out.append("further steps, which take too long")
            break
        try:
            expected, given = runner.read(case), together.read(case)
        except Unrunnable as error:
            return PairVerdict(3, reason=str(error))
        except EvaluationError as error:
            return PairVerdict(3, FAILED, error.parts[1])
        errors = {name: relative_error(values, given[name]) if name in given else None for name, values in expected.items()}
        compared = StepErrors(case.name, errors)
        found.comparisons[0].steps.append(compared)
        if not compared.worst <= EXACT:
            found.status, found.difference = DIFFERENT, f"in '{case.name}', the ranks differ by {compared.worst:.1e}"
            break
    return found


class RankSteps(Steps):
    """All ranks as one that takes steps: caches divided before, joined after. `run_all`: of one dictionary of inputs a rank, one of
    outputs a rank. `taken`: by rank, the inputs that it has."""

    def __init__(
        self, run_all: Callable[[list[Outputs]], list], taken: Sequence[set[str]], whole: Subject, lowered: Subject,
        division: Division,
    ):  # fmt: skip
        super().__init__(whole.model, whole.signature)
        self.run_all, self.taken, self.division = run_all, taken, division

    def run(self, step: Step | Feeds) -> Outputs:
        from suture.core.network.runner import to_numpy  # only here: torch takes seconds

        feeds = {name: _wide(values) for name, values in self.feeds(step).items()}
        placed, ranks = self.division.placements, self.division.ranks
        given = [
            {name: part(values, placed.get(name), rank, ranks) for name, values in feeds.items() if name in taken}
            for rank, taken in enumerate(self.taken)
        ]
        results = [{name: to_numpy(value) for name, value in found.items()} for found in self.run_all(given)]
        return {name: joined([each[name] for each in results], placed.get(name)) for name in results[0]}

    def read(self, step: Step | Feeds) -> Outputs:
        return self.select(step, self.run(step))


def part(values: np.ndarray, placement: Placement | None, rank: int, ranks: int) -> np.ndarray:
    """What `rank` has of an input."""
    if placement is None:
        return values
    taken = [np.arange(start, end) for start, end in placement.spans(rank, ranks)]
    return np.ascontiguousarray(values.take(np.concatenate(taken), axis=placement.axis))


def joined(parts: list[np.ndarray], placement: Placement | None) -> np.ndarray:
    """The output that the ranks have these parts of; each has all of one that is not divided."""
    if placement is None:
        return parts[0]
    whole = np.empty(
        [placement.size if axis == placement.axis else size for axis, size in enumerate(parts[0].shape)], parts[0].dtype
    )
    for rank, values in enumerate(parts):
        start = 0
        for first, end in placement.spans(rank, len(parts)):
            index = [slice(None)] * values.ndim
            index[placement.axis] = slice(first, end)
            whole[tuple(index)] = values.take(range(start, start + end - first), axis=placement.axis)
            start += end - first
    return whole


def _wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) if values.dtype.name in ("float16", "bfloat16") else values
