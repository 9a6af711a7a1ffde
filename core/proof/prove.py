"""What surgery wrote against what it was made of: source ↔ portable graph in onnxruntime (level 2), portable graph ↔ the network
that TensorRT's parser makes of the lowered one (level 3).

Each pair is compared twice: as float32 shadow copies, in which 1e-5 of an output's largest value is a difference in meaning,
and, of graphs in 16 bits, in their own type, where it is rounding.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from suture.core.dtypes import BY_ONNX, HALVES
from suture.core.errors import UserError
from suture.core.layerwise import is_large
from suture.core.network.inputs import Feeds
from suture.core.network.parse import NoTensorRT, ParserProcess, ParserRefused, shared_parser
from suture.core.proof.cases import alone, enough, make_cases, why_not
from suture.core.proof.differences import first_difference, relative_error
from suture.core.proof.excerpt import excerpt
from suture.core.proof.nudged import with_numbers_nudged
from suture.core.proof.steps import LAST, Runner, Step, Steps, Unrunnable
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import (
    DIFFERENT,
    FAILED,
    FLOAT32,
    NOT_RUN,
    PASSED,
    DtypeComparison,
    PairVerdict,
    Proof,
    StepErrors,
)
from suture.core.shadow_copy import has_types
from suture.core.signature import LOGITS

EXACT = 1e-5  # of the largest value, between float32 shadow copies
ROUNDING = {TensorProto.FLOAT16: 2e-2, TensorProto.BFLOAT16: 5e-2}
ROUNDED = 0.1  # where activations are rounded to 8 bits: one that lies half-way goes either way
SECONDS = 12  # of each comparison, from which no further inputs are begun
FEW = (
    "rows of different lengths",
    "decoding",
    "prompt",
)  # of the steps, for an excerpt: the first has most of the others in it
NO_TENSORRT = "no TensorRT"

Case = Step | Feeds
Outputs = dict[str, np.ndarray]


def prove(
    source: Subject,
    portable: Subject,
    lowered: onnx.ModelProto,
    unquantised: Subject | None = None,
    quantised: bool = False,
    parser: ParserProcess | None = None,
    whole: bool = False,
) -> Proof:
    """`lowered`: with the portable graph's weights and signature. `unquantised`: the portable graph from before it was
    `quantised`, which is what level 2 is about then. `whole`: without limits on time, and all layers of large graphs."""
    started = time.monotonic()
    left_out: list[str] = []
    subjects = {"source": source, "portable": portable, "candidate": unquantised or portable}
    subjects["lowered"] = Subject(lowered, portable.signature, portable.root)
    if not whole and any(is_large(each.model) for each in subjects.values()):
        cut = excerpt(subjects, portable)
        if cut is None:
            reason = "more than 4 GB of weights, and no caches that tell its layers apart; --verify-all runs all of it"
            return Proof([PairVerdict(2, reason=reason), PairVerdict(3, reason=reason)], _since(started))
        models, signatures, behind = cut
        subjects = {name: Subject(models[name], signatures[name], each.root) for name, each in subjects.items()}
        left_out.append(behind)
    session = _Session(subjects, None if whole else SECONDS)
    if left_out:
        session.cases = [case for name in FEW for case in session.cases if case.name == name] or session.cases[:2]
    unknown = "surgery has left no graph from before it quantised" if quantised and unquantised is None else None
    pairs = [PairVerdict(2, reason=unknown) if unknown else session.level_2(), session.level_3(parser)]
    for pair in pairs:
        if pair.status == PASSED:
            pair.left_out[:0] = left_out
    return Proof(pairs, _since(started))


def compare_two(first: Subject, second: Subject, tolerance: float | None = None, seed: int = 0) -> PairVerdict:
    """Any two graphs with the same inputs, whole: level 2 of a pair that surgery has nothing to do with. `tolerance`: in the
    place of all others; `seed`: of the inputs of graphs without caches."""
    return _Session({"source": first, "portable": second, "candidate": second}, None, tolerance, seed).level_2()


class _Session:
    """Both pairs on the same inputs: what the portable graph computes is computed once."""

    def __init__(self, subjects: dict[str, Subject], seconds: float | None, tolerance: float | None = None, seed: int = 0):
        known = next((size for each in subjects.values() if (size := each.signature.vocabulary)), None)
        subjects = {  # of the same tokens, whether or not a graph says how many there are
            name: replace(each, signature=replace(each.signature, vocabulary=known)) for name, each in subjects.items()
        }
        self.subjects, self.seconds, self.tolerance = subjects, seconds, tolerance
        self.outputs: dict[tuple, Outputs | Unrunnable] = {}
        self.runners: dict[tuple, Runner | Unrunnable] = {}
        models = [each.model for each in subjects.values()]
        self.halves = [half for half in HALVES if any(has_types(model, (half,)) for model in models)]
        self.rounds = any(node.op_type == "QuantizeLinear" for model in models for node in model.graph.node)
        self.why_not = next((reason for each in models if (reason := why_not(each))), None)
        self.steps = Steps(subjects["candidate"].model, subjects["candidate"].signature)
        self.cases: list[Case] = []
        if self.why_not is None:
            source, portable = subjects["source"], subjects["portable"]
            try:
                self.cases = make_cases(source.model, source.signature, portable.model, portable.signature, seed)
            except UserError as error:
                self.why_not = f"no inputs can be drawn for it: {error.parts[1]}"
            if not self.cases and self.why_not is None:
                self.why_not = "its fixed sizes leave room for none of the steps"

    def level_2(self) -> PairVerdict:
        pair = PairVerdict(2, reason=self.why_not)
        dtypes = [TensorProto.FLOAT, *(half for half in self.halves if half == TensorProto.FLOAT16)]
        for dtype in dtypes if self.why_not is None else ():
            wide = dtype == TensorProto.FLOAT
            names = ("source", "candidate")

            def run(name: str, case: Case, wide: bool = wide) -> Outputs:
                return self._in_onnxruntime(name, case, wide)

            def again(name: str, case: Case, extra: tuple[str, ...], wide: bool = wide) -> Outputs:
                return self._again(name, case, extra, wide)

            self._compare(pair, dtype, names, run, again)
        self.runners.clear()  # level 3 knows their outputs, and what evaluates the network takes as much memory
        return pair

    def level_3(self, parser: ParserProcess | None) -> PairVerdict:
        pair, lowered = PairVerdict(3, reason=self.why_not), self.subjects["lowered"]
        if missing := _missing(self.subjects["portable"], lowered):
            return PairVerdict(3, FAILED, f"the lowered graph has no {missing!r}")
        try:
            network = (parser or shared_parser()).parse(Path("model.trt.onnx"), lowered.model, lowered.root)
        except NoTensorRT:
            return PairVerdict(3, reason=NO_TENSORRT)
        except ParserRefused as error:
            first, more = error.refusals[0], len(error.refusals) - 1
            behind = f" and {more} more" if more else ""
            return PairVerdict(3, FAILED, f"TensorRT's parser refuses {first}{behind}; suture check says what helps")
        except UserError as error:
            return PairVerdict(3, FAILED, error.parts[1])
        own = {value.name for value in lowered.model.graph.input}
        if others := [name for name in network.inputs if name not in own]:
            what = f"TensorRT's parser makes an input of {', '.join(others)}, which is none; suture check says what helps"
            return PairVerdict(3, FAILED, what)
        from suture.core.network.evaluate import EvaluationError, Evaluator, NotEvaluated  # only here: torch takes seconds
        from suture.core.proof.network_steps import NetworkSteps

        for dtype in [TensorProto.FLOAT, *self.halves] if self.why_not is None else ():
            wide = dtype == TensorProto.FLOAT
            try:
                evaluate = Evaluator(network, wide=wide, check=wide, graph=lowered.model, root=lowered.root)
            except NotEvaluated as unknown:
                return PairVerdict(3, reason=unknown.parts[1])
            runner = NetworkSteps(evaluate, lowered.model, lowered.signature)

            def run(name: str, case: Case, wide: bool = wide, runner: NetworkSteps = runner) -> Outputs:
                if name == "portable":
                    return self._in_onnxruntime(name, case, wide)
                try:
                    return runner.read(case)
                except EvaluationError as error:
                    raise Unrunnable(error.parts[1]) from None

            def again(name: str, case: Case, extra: tuple[str, ...], wide=wide, runner: NetworkSteps = runner) -> Outputs:
                known = tuple(each for each in extra if each in network.tensors)
                return self._again(name, case, known, wide) if name == "portable" else runner.run(case, known)

            self._compare(pair, dtype, ("portable", "network"), run, again)
        return pair

    def _compare(
        self,
        pair: PairVerdict,
        dtype: int,
        names: tuple[str, str],
        run: Callable[[str, Case], Outputs],
        again: Callable[[str, Case, tuple[str, ...]], Outputs],
    ) -> None:
        """Adds the comparison in one type to the pair, unless another one has found a difference."""
        if pair.status == DIFFERENT:
            return
        tolerance = EXACT if dtype == TensorProto.FLOAT else ROUNDING[dtype]
        tolerance = self.tolerance or (max(tolerance, ROUNDED) if self.rounds else tolerance)
        found = DtypeComparison(FLOAT32 if dtype == TensorProto.FLOAT else BY_ONNX[dtype].numpy, tolerance)
        refused: list[str] = []
        done: list[Case] = []
        started = time.monotonic()
        for number, case in enumerate(self.cases):
            if enough(done):
                break
            if found.steps and self.seconds is not None and time.monotonic() > started + self.seconds:
                pair.left_out.append(f"{len(self.cases) - number} of {len(self.cases)} sets of inputs, which take too long")
                break
            try:
                expected = run(names[0], case)
            except Unrunnable as reason:
                refused.append(str(reason))
                continue
            try:
                given = run(names[1], case)
            except Unrunnable as reason:
                pair.status, pair.difference = DIFFERENT, f"in '{case.name}', the {names[1]} graph fails: {reason}"
                return
            compared = StepErrors(case.name, _errors(expected, given))
            found.steps.append(compared)
            done.append(case)
            if not compared.worst <= tolerance and dtype == TensorProto.FLOAT and self.halves and not self.tolerance:
                found.tolerance = tolerance = max(tolerance, EXACT + self._of_constants(names[0], case, expected))
            if not compared.worst <= tolerance:
                pair.status = DIFFERENT
                pair.difference = self._said(compared, found, case, names, again)
                break
        if found.steps:
            pair.comparisons.append(found)
            pair.status = PASSED if pair.status == NOT_RUN else pair.status
        elif pair.comparisons:
            pair.left_out.append(f"{found.dtype} ({refused[0]})")
        else:
            pair.reason = refused[0]

    def _said(self, compared: StepErrors, found: DtypeComparison, case: Case, names: tuple[str, str], again: Callable) -> str:
        def key(name: str) -> float:
            error = compared.errors[name]
            return float("inf") if error is None else error

        output = max(compared.errors, key=key)
        error = "has another shape, or NaN or infinity in other places" if not np.isfinite(key(output)) else (
            f"differs by {key(output):.1e} of its largest value, more than {found.tolerance:.0e}"
        )  # fmt: skip
        first, second = self.subjects[names[0]].model.graph, self.subjects.get(names[1], self.subjects["portable"]).model.graph
        known = {name for node in first.node for name in node.output}
        runs = partial(again, names[0], case), partial(again, names[1], case)
        try:
            where = first_difference(second, known, runs, case, found.tolerance)
        except UserError as reason:
            where = f"where is not known: {reason.parts[1]}"
        return f"in '{case.name}', {output} {error}, in {found.dtype}; {where}"

    def _in_onnxruntime(self, name: str, case: Case, wide: bool) -> Outputs:
        subject = self.subjects[name]
        wide = wide or TensorProto.FLOAT16 not in self.halves  # bfloat16 is computed in float32 in any case
        return _once(self.outputs, (id(subject.model), id(case), wide), lambda: self._read(name, case, wide))

    def _read(self, name: str, case: Case, wide: bool) -> Outputs:
        return self._read_with(self._runner(self.subjects[name], wide), name, case)

    def _read_with(self, runner: Runner, name: str, case: Case) -> Outputs:
        """Of a step, or of its rows one by one, which the source may need."""
        if name != "source" or not alone(case, runner, self.steps):
            return runner.read(case)
        rows = [runner.read(row) for row in case.rows]
        return {output: np.concatenate([row[output] for row in rows]) for output in rows[0]}

    def _runner(self, subject: Subject, wide: bool) -> Runner:
        return _once(self.runners, (id(subject.model), wide), lambda: subject.runner(wide))

    def _of_constants(self, name: str, case: Case, expected: Outputs) -> float:
        """How much an output may change because one number of the graph is rounded to 16 bits, as a fused operator's is not."""
        subject = self.subjects[name]
        nudged = replace(subject, model=with_numbers_nudged(subject.model))
        runner = nudged.runner(True)
        try:
            found = self._read_with(runner, name, case)
        except Unrunnable:
            return 0.0
        changes = [relative_error(expected[output], values) for output, values in found.items()]
        return max((change for change in changes if np.isfinite(change)), default=0.0)

    def _again(self, name: str, case: Case, extra: tuple[str, ...], wide: bool) -> Outputs:
        subject = self.subjects[name]
        ends = {value.name for value in subject.model.graph.output}
        return subject.runner(wide, tuple(each for each in extra if each not in ends)).run(case)


def _once(known: dict[tuple, Any], key: tuple, make: Callable[[], Any]) -> Any:
    """What `known` has under the key, made the first time; raises Unrunnable each time if it could not be."""
    if key not in known:
        try:
            known[key] = make()
        except Unrunnable as reason:
            known[key] = reason
    if isinstance(found := known[key], Unrunnable):
        raise found
    return found


def _errors(expected: Outputs, found: Outputs) -> dict[str, float | None]:
    """Of each output; None for one that is missing. Where only the last tokens' logits are left, those stand for all."""
    wanted = [name for name in expected if not (name == LOGITS and LOGITS not in found and LAST in found)]
    return {name: relative_error(expected[name], found[name]) if name in found else None for name in wanted}


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def _missing(portable: Subject, lowered: Subject) -> str | None:
    """An output of the portable graph's, or a cache that it takes, that the lowered one has not."""
    needed = [value.name for value in portable.model.graph.output] + [cache.past for cache in portable.signature.caches]
    there = {value.name for value in (*lowered.model.graph.output, *lowered.model.graph.input)}
    return next((name for name in needed if name not in there), None)
