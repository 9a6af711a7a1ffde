"""What surgery did, as report.json and as what it prints."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import onnx_graphsurgeon as gs
from rich.markup import escape
from rich.table import Table

from suture.core.signature import Signature
from suture.core.traits import ACCOUNTED, STANDARD
from suture.surgery.graph import Graph, NearMiss

LEFT_DECOMPOSED = ("Softmax", "ReduceMean", "Sigmoid", "Erf", "Tanh")  # what fused forms are made of
NOT_FOR_TENSORRT = ("Attention",)  # what no lowered graph should hold
TABLES = ("Cos", "Cast", "Concat", "Expand", "Gather", "Identity", "Mul", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
          "Unsqueeze")  # fmt: skip
UNKNOWN_FORM = "no pass knows this form"
EXPERTS = "a mixture of experts stays as it is: the standard has no operator for it, and TensorRT builds none"
UNSUPPORTED = {"TopK": EXPERTS, "MoE": EXPERTS, "QMoE": EXPERTS}
WEIGHED = (
    "Softmax",
    "Sigmoid",
    "Cast",
    "ReduceSum",
    "Add",
    "Div",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Transpose",
    "Slice",
    "Split",
)


@dataclass(frozen=True)
class PassVerdict:
    """What onnxruntime says of a pass: the worst error, of the largest value of an output, or why it says nothing."""

    error: float | None = None
    unverified: str | None = None


@dataclass
class PassReport:
    """What one pass did: matches, nodes before and after, seconds, and where it nearly matched."""

    name: str
    formula: str
    matches: int
    nodes_before: int
    nodes_after: int
    seconds: float
    near_misses: list[NearMiss] = field(default_factory=list)
    verdict: PassVerdict | None = None  # None where nobody asked


@dataclass
class SurgeryReport:
    """Everything report.json holds. `ops` and `nodes` by stage: before, portable, lowered."""

    passes: list[PassReport] = field(default_factory=list)
    ops: dict[str, dict[str, int]] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    unfused: list[dict[str, str]] = field(default_factory=list)
    signature: dict[str, list[dict]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    proof: dict | None = None  # as suture.core.proof.verdict has it; None where nobody asked

    def count(self, stage: str, graph: Graph) -> None:
        ops = Counter(f"{node.domain}::{node.op}" if node.domain else node.op for node in graph.gs.nodes)
        self.ops[stage] = dict(ops.most_common())
        self.nodes[stage] = len(graph.gs.nodes)
        self.signature[stage] = [
            {"name": tensor.name, "shape": [str(size) for size in tensor.shape or []], "direction": direction}
            for direction, tensors in (("input", graph.gs.inputs), ("output", graph.gs.outputs))
            for tensor in tensors
        ]

    def list_unfused(self, graph: Graph, source: Signature) -> None:
        """Names every node of the finished graph that a pass nearly matched, or that a fused form should have taken in.

        Passes name nodes anew, so a near miss is found again by the tensor that its node computes, whose name changes
        only where it is one of the `source`'s outputs. Of several near misses the last pass's first stands: it came
        closest, and what it says first is the most particular.
        """
        renamed = {old.present: new.present for old, new in zip(source.caches, graph.signature.caches)}
        reasons: dict[str, tuple[str, str]] = {}
        for each in self.passes:
            misses = [(renamed.get(miss.tensor, miss.tensor), miss.reason) for miss in each.near_misses]
            reasons |= {tensor: (each.name, reason) for tensor, reason in reversed(misses)}
        self.unfused = [
            {"node": node.name, "op": node.op, "pass": reason[0], "reason": reason[1]}
            for node in graph.gs.nodes
            if (reason := reasons.get(node.outputs[0].name, _untaken(graph, node)))
        ]
        self.unfused.sort(key=lambda each: each["pass"] != "static_cache")  # a cache that is copied costs the most

    def not_lowered(self, graph: Graph, passes: int) -> list[str]:
        """What the last `passes` passes left as it is though TensorRT reads it wrongly or not at all, and why."""
        reasons: dict[str, str] = {}
        for each in self.passes[len(self.passes) - passes :]:
            reasons |= {miss.tensor: f"{each.name}: {miss.reason}" for miss in reversed(each.near_misses)}
        left = [node for node in graph.gs.nodes if node.op in NOT_FOR_TENSORRT and node.outputs[0].name in reasons]
        return [f"not lowered: {node.op} at {node.name} ({reasons[node.outputs[0].name]})" for node in left]

    def as_json(self) -> dict:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """What to know of the graph, and what stayed unfused, alike cases together."""
        yield from self.notes
        together: dict[tuple[str, str, str], list[str]] = {}
        for each in self.unfused:
            together.setdefault((each["op"], each["pass"], each["reason"]), []).append(each["node"])
        for (op, name, reason), nodes in together.items():
            more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
            yield f"not fused: {op} at {nodes[0]}{more} ({f'{name}: ' if name else ''}{reason})"
        asked = [each for each in self.passes if each.verdict]
        for reason in dict.fromkeys(each.verdict.unverified for each in asked if each.verdict.unverified):
            names = [each.name for each in asked if each.verdict.unverified == reason]
            yield f"not verified on its own: {', '.join(names)} ({reason})"
        verified = [each for each in asked if each.verdict.error is not None]
        if verified:
            worst = max(verified, key=lambda each: each.verdict.error)
            error = f"{worst.verdict.error:.1e} of the largest value ({worst.name})"
            yield f"verified: {len(verified)} passes, worst error {error}"

    def table(self) -> Table:
        """The op counts before and after, ops that changed most first."""
        table = Table("op", *(f"{stage} ({count})" for stage, count in self.nodes.items()))
        for column in table.columns[1:]:
            column.justify = "right"
        ops = {op for counts in self.ops.values() for op in counts}
        first, last = next(iter(self.ops.values())), list(self.ops.values())[-1]
        for op in sorted(ops, key=lambda op: (-abs(first.get(op, 0) - last.get(op, 0)), op)):
            table.add_row(escape(op), *(str(counts.get(op, "·")) for counts in self.ops.values()))
        return table


def _untaken(graph: Graph, node: gs.Node) -> tuple[str, str] | None:
    """Why a node that no pass nearly matched is none of a fused form, where it looks like one."""
    beyond = graph.beyond(node) if node.op in ACCOUNTED and node.domain in STANDARD else None
    if beyond is not None:
        return "", f"{beyond} is not accounted for"
    return ("", _why(node)) if _unfused(node) else None


def _unfused(node: gs.Node) -> bool:
    """Whether it is part of a form that some pass writes as one node, or a contrib operator of onnxruntime."""
    if node.op == "TopK":
        return _weighs_experts(node)
    if node.op == "Tanh" and _caps_output(node):
        return False
    return node.op in (*LEFT_DECOMPOSED, *UNSUPPORTED) or bool(node.domain) or (node.op == "Cos" and _rotates_by_hand(node))


def _caps_output(tanh: gs.Node) -> bool:
    """Whether it caps logits, cap * tanh(x / cap), which are an output and go nowhere else."""
    scaled = tanh.outputs[0].outputs
    return bool(scaled) and all(node.op == "Mul" and not node.outputs[0].outputs for node in scaled)


def _weighs_experts(choice: gs.Node) -> bool:
    """Whether a TopK routes: its values, made to sum to one or not, multiply what was computed, or are scattered to do so, or
    its indices are compared with an expert's. A detector's TopK gives the places of boxes, and scores that go out."""
    return _reaches(choice.outputs[0], ("Mul", "MatMul", "ScatterElements", "ScatterND")) or any(
        _reaches(indices, ("Equal", "OneHot")) for indices in choice.outputs[1:]
    )


def _reaches(tensor: gs.Tensor, ops: tuple[str, ...]) -> bool:
    waiting, seen = [tensor], set()
    while waiting:
        for node in waiting.pop().outputs:
            if node.op in ops:
                return True
            if id(node) not in seen and node.op in WEIGHED:
                seen.add(id(node))
                waiting += node.outputs
    return False


def _rotates_by_hand(cosine: gs.Node) -> bool:
    """Whether a table of cosines goes elsewhere than into RotaryEmbedding nodes."""
    waiting, seen = [cosine], set()
    while waiting:
        node = waiting.pop()
        if id(node) not in seen and node.op != "RotaryEmbedding":
            seen.add(id(node))
            if node.op not in TABLES:
                return True
            waiting += [user for tensor in node.outputs for user in tensor.outputs]
    return False


def _why(node: gs.Node) -> str:
    if node.op == "Softmax" and any(above.op == "Concat" for above in node.inputs[0].inputs):
        return "something is joined to the scores, as a sink, for which Attention has no input"
    return UNSUPPORTED.get(node.op, UNKNOWN_FORM)
