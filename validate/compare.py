"""Two decoders through the same scenarios, compared by Polygraphy.

An error is the largest absolute difference of an output at a step, divided by the largest value that the reference has
there: for logits, "of the largest logit". In a quantised cache, what is beyond one step of its rounding counts. NaN and
infinity, on either side or on both, a missing output and a step that fails are differences too.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from suture.core.proof.verdict import DIFFERENT, FAILED, NOT_RUN, PASSED
from suture.core.signature import LOGITS
from suture.core.tolerances import between_sessions, rounding_step
from suture.validate.runners import DecoderRunner, SteppedModel
from suture.validate.scenarios import Scenario

__all__ = ["DIFFERENT", "FAILED", "NOT_RUN", "PASSED", "compare"]  # statuses, with those of a proof

NAN, INFINITE = "not a number", "infinite"
SAVED_BYTES = 1 << 16  # of one output at one step in Polygraphy's JSON: evenly spaced tokens, the last among them


@dataclass
class OutputError:
    """The worst step of one output."""

    output: str
    error: float | None  # None: not a number
    step: int
    problem: str | None = None  # where there is no error to give: NaN, another shape, missing

    def worse_than(self, other: "OutputError") -> bool:
        return (self.error is None, self.error or 0) > (other.error is None, other.error or 0)


@dataclass
class ScenarioResult:
    name: str
    what: str
    status: str
    reason: str | None = None
    outputs: list[OutputError] = field(default_factory=list)
    token_errors: list[float | None] = field(default_factory=list)  # of the logits, token by token
    step_tokens: list[int] = field(default_factory=list)  # how many of token_errors each step has
    seconds: dict[str, float] = field(default_factory=dict)  # by runner

    def exceeding(self, tolerance: float) -> list[str]:
        """The outputs that differ, in the graph's order."""
        return [each.output for each in self.outputs if each.error is None or not each.error <= tolerance]


@dataclass
class Comparison:
    reference: str
    candidate: str
    tolerance: float
    scenarios: list[ScenarioResult] = field(default_factory=list)

    @property
    def status(self) -> str:
        """Different if any scenario is; not run if none ran."""
        statuses = {scenario.status for scenario in self.scenarios}
        return next((status for status in (DIFFERENT, PASSED) if status in statuses), NOT_RUN)

    @property
    def worst(self) -> OutputError | None:
        outputs = [output for scenario in self.scenarios for output in scenario.outputs]
        worst = outputs[0] if outputs else None
        for output in outputs:
            worst = output if output.worse_than(worst) else worst
        return worst


def compare(
    reference: SteppedModel,
    candidate: SteppedModel,
    scenarios: list[Scenario],
    tolerance: float | None = None,
    save: Callable[[str], Path] | None = None,
    tell: Callable[[str], None] = lambda scenario: None,
) -> Comparison:
    """Runs every scenario on both: the reference row by row without padding, the candidate in batches.

    `save(scenario)` names the file for Polygraphy's run results; `tell(scenario)` hears what begins.
    """
    if tolerance is None:
        tolerance = between_sessions({reference.dtype, candidate.dtype})
    comparison = Comparison(reference.name, candidate.name, tolerance)
    capacity = min((model.capacity for model in (reference, candidate) if model.capacity is not None), default=None)
    for scenario in scenarios:
        tell(scenario.name)
        if capacity is not None and scenario.slots > capacity:
            reason = f"needs {scenario.slots} cache slots, and there are {capacity}"
            comparison.scenarios.append(ScenarioResult(scenario.name, scenario.what, NOT_RUN, reason))
            continue
        comparison.scenarios.append(_compare_scenario(reference, candidate, scenario, tolerance, save))
    return comparison


def _compare_scenario(
    reference: SteppedModel, candidate: SteppedModel, scenario: Scenario, tolerance: float, save: Callable[[str], Path] | None
) -> ScenarioResult:
    last = scenario.last_only or reference.last_only or candidate.last_only
    runners = [DecoderRunner(reference, alone=True, last=last), DecoderRunner(candidate, last=last)]
    runners[1].name += " " if reference.name == candidate.name else ""  # Polygraphy tells runners apart by name
    result = ScenarioResult(scenario.name, scenario.what, PASSED)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        try:
            results = Comparator.run(runners, data_loader=scenario.steps)
        except MemoryError:  # which says nothing of the graphs
            raise
        except Exception as error:  # a graph that cannot take a step is different from one that can
            for runner in runners:
                runner.deactivate_impl()
            result.status, result.reason = DIFFERENT, f"a step failed: {_brief(error)}"
            return result
        steps = list(zip(*results.values()))
        with np.errstate(invalid="ignore"):  # of infinity, which _output_error looks for
            verdicts = [_compare_outputs(*step, tolerance) for step in steps]
        if save is not None:
            _thinned(results).save(str(save(scenario.name)))
    for index, (step, verdict) in enumerate(zip(steps, verdicts)):
        _record_step(result, index, *step, verdict)
    for runner, iterations in results.items():
        result.seconds[runner] = sum(iteration.runtime for iteration in iterations)
    return result


def _compare_outputs(reference: IterationResult, candidate: IterationResult, tolerance: float) -> OrderedDict:
    """Polygraphy's comparison by maximum, its absolute tolerance set from the reference's largest value. What is not finite
    is a difference whatever it says: see _output_error."""
    atol = {name: tolerance * _largest(value) + rounding_step(value) for name, value in reference.items()}
    return SimpleCompareFunc(check_error_stat="max", atol=atol, rtol=0.0)(reference, candidate)


def _record_step(
    result: ScenarioResult, step: int, reference: IterationResult, candidate: IterationResult, verdict: OrderedDict
) -> None:
    worst = {output.output: output for output in result.outputs}
    for name, expected in reference.items():
        found = _output_error(name, step, expected, candidate, verdict)
        if found.problem or not verdict[name]:
            result.status = DIFFERENT
        if name not in worst or found.worse_than(worst[name]):
            worst[name] = found
    for name in candidate.keys() - reference.keys():
        result.status = DIFFERENT
        worst[name] = OutputError(name, None, step, "only the candidate has it")
    result.outputs = list(worst.values())
    if worst[LOGITS].problem in (None, NAN, INFINITE):
        expected, found = reference[LOGITS], candidate[LOGITS]
        with np.errstate(invalid="ignore"):
            errors = np.abs(found - expected).max(axis=1) / (_largest(expected) or 1.0)
        result.token_errors += [float(f"{error:.3g}") if np.isfinite(error) else None for error in errors]
        result.step_tokens.append(len(errors))


def _output_error(name: str, step: int, expected: np.ndarray, candidate: IterationResult, verdict: OrderedDict) -> OutputError:
    if name not in candidate:
        return OutputError(name, None, step, "missing")
    if candidate[name].shape != expected.shape:
        return OutputError(name, None, step, f"shape {candidate[name].shape} instead of {expected.shape}")
    for problem, found in ((NAN, np.isnan), (INFINITE, np.isinf)):
        if found(expected).any() or found(candidate[name]).any():  # on both sides, too: they agree on nothing
            return OutputError(name, None, step, problem)
    error = max(verdict[name].max_absdiff - rounding_step(expected), 0.0) / (_largest(expected) or 1.0)
    return OutputError(name, float(error), step)


def _brief(error: Exception) -> str:
    """onnxruntime puts the reason last, behind source paths and signatures, and the node's name before them."""
    line = str(error).strip().splitlines()[0]
    node = re.search(r"Name:'([^']*)'", line)
    reason = line.split(" was false.")[-1].strip()[-200:]
    return f"{node[1]}: {reason}" if node else reason


def _largest(value: np.ndarray) -> float:
    """Of the finite ones: an infinite scale would let everything pass."""
    return float(np.abs(value).max(initial=0.0, where=np.isfinite(value)))


def _thinned(results: RunResults) -> RunResults:
    """The same run with fewer tokens: Polygraphy writes base64 JSON, which for a real vocabulary would be gigabytes."""
    thin = RunResults()
    for runner, iterations in results.items():
        thin.append((runner, [_thinned_step(iteration) for iteration in iterations]))
    return thin


def _thinned_step(step: IterationResult) -> IterationResult:
    outputs = OrderedDict()
    for name, value in step.items():
        keep = max(1, SAVED_BYTES * len(value) // max(value.nbytes, 1))
        rows = np.unique(np.linspace(len(value) - 1, 0, min(keep, len(value))).astype(int))
        outputs[name] = value[rows]
    return IterationResult(outputs, runtime=step.runtime, runner_name=step.runner_name)
