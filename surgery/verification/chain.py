"""Two graphs joined against the two run one after the other, in onnxruntime, as float32 shadow copies on drawn inputs."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from suture.core.dtypes import HALVES
from suture.core.errors import UserError
from suture.core.layerwise import is_large
from suture.core.network.inputs import Feeds
from suture.core.proof.cases import enough, make_cases, why_not
from suture.core.proof.differences import relative_error
from suture.core.proof.prove import EXACT, SECONDS
from suture.core.proof.steps import Runner, Unrunnable
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import DIFFERENT, FLOAT32, NOT_RUN, PASSED, DtypeComparison, StepErrors
from suture.core.shadow_copy import float32_shadow_copy, has_types


@dataclass(frozen=True)
class ChainVerdict:
    """`status` as a proof's pair has it, and `said`: in one line."""

    status: str
    said: str


def compare_chain(
    first: Subject, second: Subject, joined: Subject, connected: Mapping[str, str], renamed: Mapping[str, str]
) -> ChainVerdict:
    """`connected`: by input of the second, the output of the first that it reads; `renamed`: by input or output of the second,
    what the joined graph calls it."""
    subjects = (first, second, joined)
    if any(is_large(each.model) for each in subjects):
        return ChainVerdict(NOT_RUN, "not proven: more than 4 GB of weights")
    first, second, joined = subjects = tuple(map(_wide, subjects))
    started, found, refused = time.monotonic(), DtypeComparison(FLOAT32, EXACT), []
    try:
        reason = next((reason for each in subjects if (reason := why_not(each.model))), None)
        cases = [] if reason else make_cases(joined.model, joined.signature, joined.model, joined.signature)
    except UserError as error:
        reason, cases = f"no inputs can be drawn for it: {error.parts[1]}", []
    if reason:
        return ChainVerdict(NOT_RUN, f"not proven: {reason}")
    try:
        runners = [each.runner(wide=False) for each in (first, second)]
    except Unrunnable as error:
        return ChainVerdict(NOT_RUN, f"not proven: {error}")
    whole: Runner | None = None
    done: list[Feeds] = []
    for case in cases:
        if enough(done) or (found.steps and time.monotonic() > started + SECONDS):
            break
        try:
            expected = _one_after_the_other(runners[0], runners[1], case, connected, renamed)
        except Unrunnable as error:
            refused.append(str(error))
            continue
        try:
            whole = whole or joined.runner(wide=False)
            given = whole.run(case)
        except Unrunnable as error:
            return ChainVerdict(DIFFERENT, f"different: in '{case.name}', the joined graph fails: {error}")
        errors = {name: relative_error(expected[name], values) for name, values in given.items()}
        found.steps.append(StepErrors(case.name, errors))
        done.append(case)
        worst = max(errors, key=errors.get)
        if not errors[worst] <= EXACT:
            what = f"{worst} differs by {errors[worst]:.1e} of its largest value, more than {EXACT:.0e}"
            return ChainVerdict(DIFFERENT, f"different: in '{case.name}', {what}")
    if not found.steps:
        return ChainVerdict(NOT_RUN, f"not proven: {refused[0]}")
    return ChainVerdict(PASSED, f"proven in {time.monotonic() - started:.1f} s (worst error {found.worst:.0e} in {FLOAT32})")


def _wide(subject: Subject) -> Subject:
    """Its float32 shadow copy, which takes and gives float32, too: nothing is rounded between the graphs."""
    model = subject.model
    return replace(subject, model=float32_shadow_copy(model, HALVES)) if has_types(model, HALVES) else subject


def _one_after_the_other(
    first: Runner, second: Runner, case: Feeds, connected: Mapping[str, str], renamed: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """What both compute, by the joined graph's names."""
    made = first.run(case)
    values = {
        name: made[connected[name]] if name in connected else case.values[renamed.get(name, name)] for name in second.inputs
    }
    return made | {renamed.get(name, name): value for name, value in second.run(Feeds(case.name, values)).items()}
