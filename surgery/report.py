"""What surgery did, as report.json and as the table that it prints."""

from collections import Counter
from dataclasses import asdict, dataclass, field

from rich.table import Table

from surgery.graph import Graph, NearMiss

LEFT_DECOMPOSED = ("Softmax", "ReduceMean", "Sigmoid", "Erf", "Tanh")  # what fused forms are made of


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


@dataclass
class Report:
    """Everything report.json holds. `ops` and `nodes` by stage: before, portable, lowered."""

    passes: list[PassReport] = field(default_factory=list)
    ops: dict[str, dict[str, int]] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    unfused: list[dict[str, str]] = field(default_factory=list)
    signature: dict[str, list[dict]] = field(default_factory=dict)

    def count(self, stage: str, graph: Graph) -> None:
        ops = Counter(f"{node.domain}::{node.op}" if node.domain else node.op for node in graph.gs.nodes)
        self.ops[stage] = dict(ops.most_common())
        self.nodes[stage] = len(graph.gs.nodes)
        self.signature[stage] = [
            {"name": tensor.name, "shape": [str(size) for size in tensor.shape or []], "direction": direction}
            for direction, tensors in (("input", graph.gs.inputs), ("output", graph.gs.outputs))
            for tensor in tensors
        ]

    def list_unfused(self, graph: Graph) -> None:
        """Names every node that a fused form should have taken in, with the near miss that stood in the way."""
        reasons = {miss.node: f"{each.name}: {miss.reason}" for each in self.passes for miss in each.near_misses}
        self.unfused = [
            {"node": node.name, "op": node.op, "reason": reasons.get(node.name, "no pass knows this form")}
            for node in graph.gs.nodes
            if node.op in LEFT_DECOMPOSED
        ]

    def as_json(self) -> dict:
        return asdict(self)

    def table(self) -> Table:
        """The op counts before and after, ops that changed most first."""
        table = Table("op", *(f"{stage} ({count})" for stage, count in self.nodes.items()))
        for column in table.columns[1:]:
            column.justify = "right"
        ops = {op for counts in self.ops.values() for op in counts}
        first, last = next(iter(self.ops.values())), list(self.ops.values())[-1]
        for op in sorted(ops, key=lambda op: (-abs(first.get(op, 0) - last.get(op, 0)), op)):
            table.add_row(op, *(str(counts.get(op, "·")) for counts in self.ops.values()))
        return table


