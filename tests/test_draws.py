"""200 fixed random graphs through surgery, onnxruntime and TensorRT's network; ten thousand: python -m benchmarks.draws."""

import ast
from collections import Counter
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import pytest

from benchmarks.draws import __main__ as command
from benchmarks.draws import draw, judge
from benchmarks.draws.contrib import CONTRIB
from benchmarks.draws.judge import AGREES, FAULTS, INVALID, NETWORK_DIFFERS, PORTABLE_DIFFERS
from benchmarks.draws.operators import STANDARD
from suture.core.network.parse import ParserProcess
from suture.core.traits import MICROSOFT, OTHERS
from suture.surgery.graph import Graph
from suture.surgery.passes.import_contrib import contrib_gelu
from suture.surgery.passes.lowering import attention_mask

SEED, DRAWS = 7, 200
PASSES = Path(__file__).parents[1] / "surgery" / "passes"
STANDARD_GELU = contrib_gelu._standard
OURS = {"TRT_Attention"}  # which surgery writes and no source has

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parser():
    with ParserProcess() as parser:
        yield parser


def test_every_operator_that_a_pass_names_is_drawn():
    schemas = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    contrib = {op for domain, op in OTHERS if domain == MICROSOFT}
    texts = {
        node.value
        for path in PASSES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    named = {op for op in texts if op in schemas | {op for _, op in OTHERS}} - OURS
    assert named <= STANDARD.keys() | CONTRIB.keys()
    assert CONTRIB.keys() == contrib  # all that are known
    assert STANDARD.keys() <= schemas


@pytest.mark.seconds
def test_draws(parser):
    verdicts = {index: judge.judge(draw(SEED, index), parser) for index in range(DRAWS)}
    faults = {index: verdict for index, verdict in verdicts.items() if verdict.result in FAULTS}
    for index in faults:
        print(onnx.printer.to_text(draw(SEED, index).model()))
    assert not faults
    valid = [verdict for verdict in verdicts.values() if verdict.result != INVALID]
    assert len(valid) > 0.9 * DRAWS
    assert sum(bool(verdict.rewritten) for verdict in valid) >= 0.3 * len(valid)
    assert Counter(verdict.result for verdict in valid)[AGREES] > 0.85 * len(valid)


def without_bias(graph: Graph, node: gs.Node) -> bool:
    """As suture.surgery.passes.import_contrib.contrib_gelu._standard, but for the bias."""
    node.inputs = node.inputs[:1]
    return STANDARD_GELU(graph, node)


@pytest.mark.seconds
def test_a_pass_that_goes_by_less_than_its_pattern_is_seen(parser, monkeypatch):
    """A GELU without its bias, and an attention in TensorRT without its scale."""
    monkeypatch.setattr(contrib_gelu, "_standard", without_bias)
    monkeypatch.setattr(attention_mask, "scale_of", lambda attention: 1.0)
    drawn = (draw(SEED, index) for index in range(2 * DRAWS))
    results = {"com.microsoft.BiasGelu": set(), "attention": set()}
    for canvas in (each for each in drawn if each.family in results):
        results[canvas.family].add(judge.judge(canvas, parser).result)
    assert PORTABLE_DIFFERS in results["com.microsoft.BiasGelu"]
    assert NETWORK_DIFFERS in results["attention"]


def test_the_command_prints_a_graph_that_differs(monkeypatch, capsys):
    monkeypatch.setattr(contrib_gelu, "_standard", without_bias)
    index = next(index for index in range(1000) if draw(0, index).family == "com.microsoft.BiasGelu")
    monkeypatch.setattr(command, "draw", lambda seed, _: draw(seed, index))
    monkeypatch.setattr("sys.argv", ["draws", "--draws", "1"])
    assert command.main() == 1
    said = capsys.readouterr().out
    assert "the portable graph differs" in said
    assert "BiasGelu" in said
