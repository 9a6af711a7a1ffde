"""The graph in onnxruntime's contrib operators: what becomes one node, that it computes what the portable graph does, and where
it stays as it is. onnxruntime's CPU has kernels for these operators, too."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from suture.core.as_written import open_session
from suture.core.proof.steps import NO_ALPHAS
from suture.core.signature import find_signature
from suture.core.weights import load_graph, weights_root
from suture.runtime.decoders import StaticDecoder
from suture.runtime.graphs import OWN_OPERATORS, open_graph
from suture.runtime.io_binding import BoundSession
from suture.surgery.__main__ import main as surgery
from suture.surgery.capacity import main as change_capacity
from suture.surgery.graph import Graph, files, producer
from suture.surgery.options import SurgeryOptions
from suture.surgery.passes.ort_contrib import group_query_attention
from suture.surgery.plan import make_plan
from suture.surgery.reports.report import SurgeryReport
from suture.surgery.runner import lower, run_plan
from suture.surgery.verification import verify
from tests.decoding import decode, largest_error
from tests.graphs import weightless

CAPACITY = 32  # tiny_own's, too
OWN = ("GroupQueryAttention", "SkipSimplifiedLayerNormalization", "QuickGelu")
LLAMA = "torch213_dynamo_llama_op23_float16"
FAMILIES = {  # attention, sums with their norms, swish
    LLAMA: (2, 4, 2),
    "optimum_onnx010_qwen2": (2, 4, 2),
    "qwen3-dynamo-23-float32": (2, 4, 2),  # heads are normed before they are rotated
    "phi3-torchscript-17-float32": (2, 4, 2),
    "gptneox-dynamo-23-float16": (2, 0, 0),  # a part of each head is rotated, before the node
    "gptbigcode-dynamo-18-float32": (2, 0, 0),
    "gpt2-torchscript-14-float32": (2, 0, 0),
    "gemma3-dynamo-18-float32": (1, 4, 0),  # every other layer has a window
    "whisper-dynamo-18-float32": (2, 0, 0),  # cross-attention stays
    "bloom-dynamo-18-float32": (0, 0, 0),  # ALiBi
}


def counts(model: onnx.ModelProto) -> tuple[int, ...]:
    found = Counter(node.op_type for node in model.graph.node if node.domain == "com.microsoft")
    return tuple(found[op] for op in OWN)


def both(source: onnx.ModelProto, folder: Path) -> tuple[onnx.ModelProto, onnx.ModelProto, SurgeryReport]:
    """The portable graph, the one in onnxruntime's operators, and the report of the passes between them."""
    onnx.save(source, folder / "source.onnx")
    plan, report = make_plan(SurgeryOptions(capacity=CAPACITY, onnxruntime=True)), SurgeryReport()
    portable, _, _ = run_plan(files.read(folder / "source.onnx"), plan)
    own = lower(portable, plan.ort_contrib, report, form="ort_contrib")
    return files.to_model(portable), files.to_model(own), report


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.sample(4)
def test_other_families_and_exporters(tmp_path, name):
    portable, own, report = both(weightless.load(name), tmp_path)
    assert counts(own) == FAMILIES[name]
    tolerance = 2e-3 if "float16" in name else 1e-5
    assert largest_error(decode(portable, alone=True), decode(own, alone=True)) < tolerance
    stays = [note for note in report.notes if "what it sees is not just the tokens before" in note]
    assert len(stays) == (name.startswith(("bloom", "gemma3")))


@pytest.mark.slow
def test_nothing_is_transposed_and_one_table_serves_all_layers(tiny_own):
    model = load_graph(tiny_own / OWN_OPERATORS)
    ops = Counter(node.op_type for node in model.graph.node)
    assert counts(model) == (4, 8, 4)
    gone = ("Transpose", "Split", "TensorScatter", "RotaryEmbedding", "Attention", "Cos", "Pow", "Swish")
    assert not [op for op in gone if ops[op]]
    assert ops["RMSNormalization"] == 1  # the first, which follows no sum
    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert len({(*node.input[5:9],) for node in attentions}) == 1
    assert all(not any(node.input[1:3]) for node in attentions)  # query, key and value side by side
    names = [value.name for value in model.graph.input if not value.name.startswith("past")]
    assert names == ["input_ids", "position_ids", "write_indices"]
    assert find_signature(model).static


def test_each_pass_is_verified(tiny_own):
    passes = json.loads((tiny_own / "report.json").read_text())["passes"]
    verdicts = {each["name"]: (each["matches"], each["verdict"]) for each in passes}
    for name, matches in {"group_query_attention": 4, "skip_norm": 8, "quick_gelu": 4, "bias_apart": 4}.items():
        assert verdicts[name][0] == matches
        assert verdicts[name][1]["error"] < 1e-5


def test_a_pass_that_is_wrong_is_found(tiny_own, monkeypatch):
    """With another scale the graph computes something else, and the check says so."""
    append = group_query_attention.append
    monkeypatch.setattr(
        group_query_attention,
        "append",
        lambda *given: append(*given[:-1], given[-1] | {"scale": 1.1 * given[-1]["scale"]}),
    )
    portable = files.read(tiny_own / "model.onnx")
    plan = make_plan(SurgeryOptions(capacity=CAPACITY, onnxruntime=True))
    check = verify.Verifier(files.to_model(portable), portable.signature, portable.root, NO_ALPHAS)
    with pytest.raises(verify.ChangedOutput, match="group_query_attention: changes"):
        lower(portable, plan.ort_contrib, SurgeryReport(), check)


def test_it_decodes_what_the_portable_graph_has_read(tiny_own):
    """As text is generated on CUDA: prompts in the one, ragged steps of a token in the other, over the same caches."""
    portable = open_graph(tiny_own / "model.onnx")
    own = open_session(load_graph(tiny_own / OWN_OPERATORS), weights_root(tiny_own / "model.onnx"), "own")
    random, lengths = np.random.default_rng(0), np.array([7, 3, 5])
    tokens = random.integers(5, portable.vocab, (3, 12))
    found = []
    for session in (portable.session, own):
        bound = BoundSession(portable.session, portable.signature, 3)
        bound.decoding = session
        decoder, steps = StaticDecoder(bound, portable.signature), []
        decoder.advance(tokens[:, :7], lengths, np.ones(3))
        for step in range(7, 12):
            steps.append(decoder.advance(tokens[:, step : step + 1], np.ones(3, np.int64), np.ones(3)).clone().numpy())
        found.append(np.stack(steps))
    assert np.abs(found[0] - found[1]).max() < 1e-4 * np.abs(found[0]).max()
    assert np.abs(found[0]).max() > 1


def test_another_capacity_has_tables_of_its_own(tiny_own, tmp_path):
    change_capacity([str(tiny_own), "--capacity", "48", "--out", str(tmp_path)])
    model = load_graph(tmp_path / OWN_OPERATORS)
    assert counts(model) == (4, 8, 4)
    tables = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer if tensor.name.startswith("rotary/")}
    assert sorted(dims[0] for dims in tables.values()) == [48, 48]
    root = weights_root(tmp_path / "model.onnx")
    found = [decode(load_graph(tmp_path / name), alone=True, root=root) for name in ("model.onnx", OWN_OPERATORS)]
    assert largest_error(*found) < 1e-5


def test_a_cache_that_outgrows_the_trained_length_keeps_standard_attention(tiny_export, tmp_path, capsys):
    arguments = [str(tiny_export / "model.onnx"), "--out", str(tmp_path), "--capacity", "640", "--onnxruntime"]
    assert surgery(arguments) == 0
    said = "model.ort.onnx: attention stays the standard's where from 256 tokens on the rotary tables depend on the prompt"
    assert said in capsys.readouterr().out.replace("\n", " ")
    model = load_graph(tmp_path / OWN_OPERATORS)
    assert counts(model) == (0, 8, 4)
    assert "ntk_alpha" in [value.name for value in model.graph.input]


def test_a_quantised_graph_has_it_too(tiny_export, tmp_path):
    arguments = ["--out", str(tmp_path), "--capacity", str(CAPACITY), "--onnxruntime", "--quantize", "int4"]
    assert surgery([str(tiny_export / "model.onnx"), *arguments]) == 0
    portable, own = (load_graph(tmp_path / name) for name in ("model.onnx", OWN_OPERATORS))
    assert counts(own) == (4, 8, 4)
    dequantised = [sum(node.op_type == "DequantizeLinear" for node in model.graph.node) for model in (portable, own)]
    assert dequantised[0] == dequantised[1] > 20
    root = weights_root(tmp_path / "model.onnx")
    assert largest_error(decode(portable, alone=True, root=root), decode(own, alone=True, root=root)) < 1e-5


def near_misses(graph: Graph) -> set[str]:
    assert group_query_attention.run(graph) == 0
    return {miss.reason for miss in graph.near_misses}


@pytest.fixture
def portable(tmp_path) -> Graph:
    onnx.save(weightless.load(LLAMA), tmp_path / "source.onnx")
    return run_plan(files.read(tmp_path / "source.onnx"), make_plan(SurgeryOptions(capacity=CAPACITY)))[0]


def test_a_cache_with_gaps_is_left(portable):
    valid = portable.nodes("Attention")[0].inputs[6]
    shorter = portable.new("Sub", [valid, portable.int64([1])], shape=["batch"])
    for node in portable.nodes("Attention"):
        node.inputs[6] = shorter
    assert near_misses(portable) == {"its cache has gaps"}


def test_queries_rotated_otherwise_than_keys_are_left(portable):
    for node in portable.nodes("Attention"):
        rotation = producer(node.inputs[0], "RotaryEmbedding")
        rotation.inputs[1] = portable.new("Neg", [rotation.inputs[1]], shape=rotation.inputs[1].shape)
    assert near_misses(portable) == {"query and key are rotated by different tables"}


def test_tables_that_depend_on_the_whole_step_are_left(portable):
    """As those of dynamic NTK do that is computed from the longest position of the step."""
    rotation = portable.nodes("RotaryEmbedding")[0]
    cos = rotation.inputs[1]
    least = portable.new("ReduceMin", [cos, portable.int64([1])], {"keepdims": 1})
    shifted = portable.new("Sub", [cos, least], shape=cos.shape)
    for node in portable.nodes("RotaryEmbedding"):
        node.inputs[1] = shifted
    assert near_misses(portable) == {"its rotary tables are not the position's alone"}
