"""Whether a pass changed what the graph computes: onnxruntime runs it before and after, on the same steps.

Also compares with the graph as it was read, so that errors which each pass keeps small cannot add up unseen.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from suture.core.proof.differences import first_difference, relative_error
from suture.core.proof.steps import ALPHAS, LAST, Runner, Step, Unrunnable
from suture.core.signature import LOGITS, Signature
from suture.core.tolerances import BFLOAT16, FLOAT, between_sessions
from suture.surgery.graph import Graph, files
from suture.surgery.graph.weights import new_file, settle, under_one_root
from suture.surgery.passes import Pass
from suture.surgery.plan import Plan
from suture.surgery.reports.report import PassVerdict
from suture.surgery.runner import apply


@dataclass
class State:
    """The graph as one pass left it."""

    model: onnx.ModelProto
    signature: Signature
    root: Path
    alphas: tuple[float, ...] = ALPHAS
    added: frozenset[str] = frozenset()  # as the graph's

    @classmethod
    def of(cls, graph: Graph, alphas: tuple[float, ...] = ALPHAS) -> "State":
        model = files.without_shapes(files.to_model(graph))
        return cls(model, graph.signature, graph.root, alphas, frozenset(graph.added))

    @property
    def head_dim(self) -> int | None:
        """The caches' last size; None where neither the graph nor its signature says it."""
        if not self.signature.caches or self.signature.head_dim > 0:
            return self.signature.head_dim
        cache = next(value for value in self.model.graph.input if value.name == self.signature.caches[0].past)
        return cache.type.tensor_type.shape.dim[3].dim_value or None

    @cached_property
    def outputs(self) -> dict[Step, dict[str, np.ndarray]]:
        """Of each step that fits. Raises Unrunnable."""
        runner = self.runner()
        steps = runner.all_fitting()
        if not steps:
            raise Unrunnable("its fixed sizes leave room for none of the steps")
        return {step: runner.read(step) for step in steps}

    def runner(self, extra: tuple[str, ...] = ()) -> Runner:
        """The graph in onnxruntime, with these tensors as outputs, too. Raises Unrunnable."""
        model = onnx.ModelProto.FromString(self.model.SerializeToString())
        return Runner(model, self.signature, under_one_root(model, self.root, self.added), extra, self.alphas)


class ChangedOutput(Exception):
    """A pass changed an output by more than the tolerance."""

    def __init__(self, name: str, reference: State, before: State, after: State, what: str, match: str = ""):
        self.name, self.reference, self.before, self.after, self.what = name, reference, before, after, what
        super().__init__(f"{name}{f', {match}' if match else ''}: {what}")


class Verifier:
    """Called with what each pass made; raises ChangedOutput. `alphas`: scales of dynamic NTK that rows have."""

    def __init__(
        self,
        source: onnx.ModelProto,
        signature: Signature,
        root: Path,
        alphas: tuple[float, ...] = ALPHAS,
        added: Collection[str] = (),
    ):
        self.alphas = alphas
        self.read = self.source = self.before = State(source, signature, root, alphas, frozenset(added))

    def restart(self, graph: Graph) -> None:
        """Compares what follows with this graph: what quantising changes is not a pass's error."""
        self.read = self.source = self.before = State.of(graph, self.alphas)

    def __call__(self, name: str, graph: Graph) -> PassVerdict:
        after = State.of(graph, self.alphas)
        if self.read.head_dim is None and after.head_dim is not None:  # now there is a cache to run what was read with
            self.read.signature = replace(self.read.signature, head_dim=after.head_dim)
            self.source = self.before = self.read
        try:
            self.before.outputs  # noqa: B018
        except Unrunnable as reason:
            self.source = self.before = after
            return PassVerdict(unverified=f"before it, {reason}")
        try:
            after.outputs  # noqa: B018
        except Unrunnable as reason:
            if "TRT_" in str(reason):
                return PassVerdict(unverified=str(reason))
            raise ChangedOutput(name, self.before, self.before, after, f"after it, {reason}") from None
        error = compare(name, self.before, self.before, after)
        if self.before is not self.source:
            compare(name, self.source, self.before, after)
        self.before = after
        return PassVerdict(error)


def compare(name: str, reference: State, before: State, after: State) -> float:
    """The worst error of `after`, as part of the largest value that `reference` has. Raises ChangedOutput."""
    worst, tolerance = 0.0, tolerance_of(reference)
    steps = [step for step in reference.outputs if step in after.outputs]
    if not steps:
        raise ChangedOutput(name, reference, before, after, "after it, no step fits the graph's sizes that did before")
    for step in steps:
        expected, found = reference.outputs[step], after.outputs[step]
        gone = expected.keys() - found.keys() - ({LOGITS} if LAST in found else set())
        if gone:
            raise ChangedOutput(name, reference, before, after, f"the output {min(gone)} is gone")
        errors = {output: relative_error(values, found[output]) for output, values in expected.items() if output in found}
        output = max(errors, key=errors.get)
        if not errors[output] <= tolerance:
            what = (
                f"changes {output} by {errors[output]:.1e} of the largest value, more than {tolerance:.0e}, in the step "
                f"'{step.name}'; {_where(before, after, step, tolerance)}"
            )
            raise ChangedOutput(name, reference, before, after, what)
        worst = max(worst, errors[output])
    return worst


def narrow(found: ChangedOutput, plan: Plan, folder: Path | None) -> ChangedOutput:
    """The same difference, down to the first match of the pass that makes it (by bisection over the number of matches).
    Weights that the pass writes on the way go into files in `folder`; None: they stay in the graphs."""
    each = next((each for each in plan.passes if each.name == found.name), None)
    if each is None:
        return found
    _, matched, _ = _limited(found.before, each, None, folder)
    low, high = 0, len(matched)
    if high == 0 or _differs(found, _limited(found.before, each, 0, folder)[0]) is not None:
        return ChangedOutput(found.name, found.reference, found.before, found.after, found.what, "outside its matches")
    while high - low > 1:
        middle = (low + high) // 2
        with TemporaryDirectory(dir=folder) as trial:
            differs = _differs(found, _limited(found.before, each, middle, Path(trial))[0]) is not None
        low, high = (low, middle) if differs else (middle, high)
    before, _, changed = _limited(found.before, each, low, folder)
    after, _, _ = _limited(found.before, each, high, folder)
    what = _differs(found, after, before) or found.what
    if low > 0 and changed == 0:  # a pass that does nothing unless it can do all
        match = f"all {len(matched)} matches together"
    else:
        match = f"match {high} of {len(matched)}, at {matched[high - 1]}"
    return ChangedOutput(found.name, found.reference, before, after, what, match)


def save(found: ChangedOutput, source: Path, folder: Path, out: Path) -> str:
    """Writes both graphs into `folder` (which becomes `out`). Returns their `weights_root`."""
    models = [found.before.model, found.after.model]
    root = settle(models, found.before.root, source, folder, out, found.before.added | found.after.added)
    for name, model in zip(("before", "after"), models):
        onnx.save(model, folder / f"{name}.onnx")
    return root


def tolerance_of(state: State) -> float:
    types = {value.type.tensor_type.elem_type for value in (*state.model.graph.input, *state.model.graph.output)}
    return between_sessions(FLOAT if each == BFLOAT16 else each for each in types)  # a runner computes float32 for it


def _differs(found: ChangedOutput, after: State, before: State | None = None) -> str | None:
    try:
        compare(found.name, found.reference, before or found.before, after)
    except ChangedOutput as difference:
        return difference.what
    except Unrunnable as reason:
        return str(reason)
    return None


def _limited(before: State, each: Pass, limit: int | None, folder: Path | None) -> tuple[State, list[str], int]:
    """What the pass makes of `before` if it stops after `limit` matches, the nodes it matched, and how often it says so."""
    graph = Graph(files.infer_shapes(before.model), before.signature, before.root)
    graph.match_limit, graph.weights_file, graph.added = limit, folder and new_file(folder), set(before.added)
    matches = apply(graph, each)
    return State.of(graph, before.alphas), graph.matched, matches


def _where(before: State, after: State, step: Step, tolerance: float) -> str:
    """The first tensor, in the order of computation, that both graphs compute, under the same name, and differently."""
    known = {name for node in before.model.graph.node for name in node.output}
    ends = {value.name for value in after.model.graph.output}

    def run(state: State, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        return state.runner(tuple(name for name in names if name not in ends)).run(step)

    return first_difference(after.model.graph, known, (partial(run, before), partial(run, after)), step, tolerance)
