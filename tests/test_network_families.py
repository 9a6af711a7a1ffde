"""What TensorRT's parser makes of each family's lowered graph computes what onnxruntime computes of the portable one:
prompt, chunked prompt, decoding, several rows, ragged lengths. `python -m benchmarks.families` does so for every graph."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from suture.core.errors import UserError
from suture.core.network.audit import audit
from suture.core.network.compare import compare as compare_network
from suture.core.network.evaluate import Evaluator
from suture.core.network.inputs import make_feeds
from suture.core.network.parse import parse
from suture.core.weights import load_graph
from suture.runtime.graphs import open_graph
from suture.runtime.network_decoder import open_network
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan
from suture.validate.compare import compare
from suture.validate.scenarios import make_scenarios, random_tokens
from tests.graphs import weightless
from tests.graphs.retype import retyped

CAPACITY = 48  # slots: room for a prompt in three chunks
WITHIN = {"float32": 1e-5, "float16": 1e-2}  # of the largest value
GRAPHS = {  # one of each family, with the types in which it is looked at here
    "llama-dynamo-24-float16": ("float16",),
    "torch213_torchscript_qwen2_op17_float32": ("float32", "float16"),
    "qwen3-dynamo-23-float32": ("float32",),
    "phi3-dynamo-18-float32": ("float32",),
    "gemma3-dynamo-18-float32": ("float32", "float16"),
    "gpt2_mask-dynamo-18-float32": ("float32",),
    "gptj-torchscript-17-float32": ("float16",),
    "opt-dynamo-18-float32": ("float32",),
    "gptbigcode-dynamo-18-float32": ("float16",),
    "gptneox-torchscript-17-float32": ("float32",),
    "bloom-dynamo-18-float32": ("float16",),
    "mpt-torchscript-17-float32": ("float32",),
    "whisper-dynamo-18-float32": ("float32", "float16"),
    "sam_vision-dynamo-18-float32": ("float32",),
}


def network_error(portable: Path, lowered: Path) -> float | None:
    """Of TensorRT's network against the portable graph, of the largest value; None where one is not a number. A graph that is
    no causal decoder is compared in single steps."""
    try:
        graph, network = open_graph(portable), open_network(lowered, device="cpu")
    except UserError:
        evaluate = Evaluator(parse(lowered), "cpu")
        outcomes = compare_network(evaluate, portable, make_feeds(load_graph(lowered)), 0)
        errors = [each.error for outcome in outcomes for each in outcome.outputs]
        return None if None in errors else max(errors)
    scenarios = make_scenarios(random_tokens(graph.vocab, 0), graph.capacity, None)
    comparison = compare(graph, network, scenarios)
    assert all(each.outputs for each in comparison.scenarios), [each.reason for each in comparison.scenarios]
    return comparison.worst.error


def write(model: onnx.ModelProto, folder: Path, **options) -> tuple[Path, Path]:
    """Portable and lowered graph of a source in memory."""
    onnx.save(model, folder / "source.onnx")
    portable, lowered, _ = run_plan(files.read(folder / "source.onnx"), make_plan(SurgeryOptions(capacity=CAPACITY, **options)))
    files.write(portable, folder / "model.onnx")
    files.write(lowered, folder / "model.trt.onnx")
    return folder / "model.onnx", folder / "model.trt.onnx"


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, dtypes in GRAPHS.items() for dtype in dtypes])
@pytest.mark.sample("gemma3*-float16", "whisper*-float32", "bloom*", "torch213*-float32")
def test_network_agrees(name, dtype, tmp_path):
    source = weightless.load(name)
    if dtype == "float16" and not name.endswith("float16"):
        source = retyped(source, TensorProto.FLOAT16)
    error = network_error(*write(source, tmp_path))
    assert error is not None
    assert error < WITHIN[dtype]


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.sample(1)
def test_the_lengths_form_agrees_and_is_warned_of(dtype, tmp_path):
    source = weightless.load("torch213_torchscript_qwen2_op17_float32")
    if dtype == "float16":
        source = retyped(source, TensorProto.FLOAT16)
    portable, lowered = write(source, tmp_path, attention="lengths")
    graph = load_graph(lowered)
    attentions = [node for node in graph.graph.node if node.op_type == "TRT_Attention"]
    assert [len(node.input) for node in attentions] == [6, 6]
    assert not any("mask" in node.name for node in graph.graph.node)
    findings = audit(parse(lowered), graph)
    assert [finding.where for finding in findings if "lengths" in finding.what] == [f"Attention {n.name}" for n in attentions]
    assert not [finding for finding in findings if finding.severity == "error"]
    error = network_error(portable, lowered)
    assert error is not None
    assert error < WITHIN[dtype]
