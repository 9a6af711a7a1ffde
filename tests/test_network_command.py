"""validate --network and its runner: what they print and write, and a network as one side of a comparison."""

import os
import subprocess
import sys
from pathlib import Path

import network_graphs as graphs
import numpy as np
import pytest
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
from test_network import DIALECTS, ROOT, network_of, parsed, save

from suture.core.as_written import open_session
from suture.core.errors import UserError
from suture.core.network.evaluate import Evaluator
from suture.core.network.inputs import make_feeds
from suture.core.network.runner import NetworkRunner
from suture.runtime.graphs import open_graph
from suture.runtime.network_decoder import open_network
from suture.validate.check import check_network
from suture.validate.compare import compare as compare_decoders
from suture.validate.scenarios import make_scenarios, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def test_polygraphy_compares_and_reads_it(tmp_path):
    model = graphs.lowered("float16")
    path = save(model, tmp_path, "model")
    portable = graphs.portable("float16")
    runners = [OnnxrtRunner(open_session(portable, tmp_path, "portable")), NetworkRunner(path)]
    results = Comparator.run(runners, data_loader=[feeds.values for feeds in make_feeds(model)])
    assert bool(Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=1e-2, rtol=1e-2)))
    results.save(str(tmp_path / "results.json"))
    tool = [Path(sys.executable).with_name("polygraphy"), "inspect", "data", str(tmp_path / "results.json")]
    shown = subprocess.run(tool, capture_output=True, text=True)
    assert shown.returncode == 0
    assert "logits" in shown.stdout


def test_intermediate_tensors_can_be_kept(tmp_path):
    model = graphs.lowered("float16")
    path, feeds = save(model, tmp_path, "model"), make_feeds(model)[0].values
    with NetworkRunner(path, keep=["mask"]) as runner:
        assert runner.infer(feeds)["mask"].shape == (2, 1, 8, graphs.CAPACITY)
    evaluate = Evaluator(network_of(path), "cpu")
    assert evaluate(feeds, keep=evaluate.network.tensors).keys() == evaluate.network.tensors.keys()


@pytest.mark.seconds
def test_command_prints_where_they_part_and_writes_results(tmp_path, capsys):
    path = save(graphs.portable("float16"), tmp_path, "model")
    assert check_network(path, out=tmp_path / "out") == 1
    shown = capsys.readouterr().out
    assert "nonpad_kv_seqlen" in shown
    assert "first divergence at Attention" in shown
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "manifest.json", "network.json", *(f"network-{name}.polygraphy.json" for name in ("prompt", "chunk", "decode"))
    }  # fmt: skip
    assert "logits" in RunResults.load(str(tmp_path / "out" / "network-decode.polygraphy.json"))[1][1][0]
    good = save(graphs.lowered("float16"), tmp_path, "lowered")
    assert check_network(good, reference=path) == 0
    with pytest.raises(UserError, match=r"onnxruntime has no TRT_Attention.*--reference"):
        check_network(good)


def test_an_error_of_the_audit_alone_is_exit_status_1(tmp_path, capsys):
    """Of a decoder, an input that nothing uses."""
    cache = 'float[B,1,{0},4] "{1}.0.key", float[B,1,{0},4] "{1}.0.value"'
    model = parsed(f"""(int64[B,S] input_ids, {cache.format("P", "past_key_values")}, int64[B] idle)
    => (float[B,S,4] logits, {cache.format("T", "present")}) <float[8,4] table = {{{", ".join("1" * 32)}}}, int64[1] one = {{1}}> {{
    e = Gather(table, input_ids)  u = Unsqueeze(e, one)
    "present.0.key" = Concat<axis = 2>("past_key_values.0.key", u)
    "present.0.value" = Concat<axis = 2>("past_key_values.0.value", u)
    k = Transpose<perm = [0, 1, 3, 2]>("present.0.key")  s = MatMul(u, k)  p = Softmax(s)
    a = MatMul(p, "present.0.value")  logits = Squeeze(a, one) }}""")
    assert check_network(save(model, tmp_path, "model")) == 1
    assert "input idle: nothing in the graph uses it" in capsys.readouterr().out


def test_made_inputs_fit_a_language_model():
    """Rows at different places of the cache, tokens of the vocabulary, positions that go with the slots written."""
    prompt, chunk, decode = make_feeds(graphs.lowered("float16"))
    for feeds in (prompt, chunk, decode):
        values = feeds.values
        assert 0 <= values["input_ids"].min() <= values["input_ids"].max() < graphs.VOCAB
        assert np.array_equal(values["position_ids"][:, 0], values["write_indices"])
        assert values["position_ids"].max() < graphs.CAPACITY
    assert len(set(decode.values["write_indices"])) == 2
    assert [feeds.values["input_ids"].shape[1] for feeds in (prompt, chunk, decode)] == [8, 4, 1]


def test_given_inputs_are_used(tmp_path, capsys):
    model = parsed("(float[N] x) => (float[N] y) { y = Relu(x) }")
    path = save(model, tmp_path, "model")
    np.savez(tmp_path / "inputs.npz", x=np.array([1, np.nan], np.float32))
    assert check_network(path, inputs=tmp_path / "inputs.npz") == 1
    assert "NaN in" in capsys.readouterr().out


def test_a_parser_that_dies_gives_one_line(tmp_path):
    model = parsed(
        "(float[2,3,16] x, int64[2,3] p, float[9,4] c) => (float[2,3,16] y) "
        "{ y = com.microsoft.RotaryEmbedding<num_heads = 0>(x, p, c, c) }"
    )
    path = save(model, tmp_path, "deadly")
    command = [sys.executable, "-m", "suture.validate", "--network", str(path)]
    died = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "300"})
    assert died.returncode == 2
    assert died.stderr.count("\n") == 1
    assert f"{path}: RotaryEmbedding node_of_y: TensorRT's parser died of SIGFPE" in died.stderr


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.sample(1)
def test_scenarios_of_validation(dtype, tmp_path):
    """Level 3: prompts, chunks, decoding, ragged batches, each side with its own caches; and a fault shows there too."""
    portable = open_graph(save(graphs.portable(dtype), tmp_path, "portable"), "portable")
    scenarios = make_scenarios(random_tokens(graphs.VOCAB, 0), graphs.CAPACITY, None)
    lowered = open_network(save(graphs.lowered(dtype), tmp_path, "lowered"), device="cpu")
    comparison = compare_decoders(portable, lowered, scenarios, 1e-5 if dtype == "float" else 1e-2)
    ran = [scenario for scenario in comparison.scenarios if scenario.status != "not run"]
    assert len(ran) >= 3
    assert comparison.status == "passed", comparison.worst
    late = open_network(save(graphs.lowered(dtype, write="late"), tmp_path, "late"), device="cpu")
    assert compare_decoders(portable, late, scenarios, 1e-2).status == "different"


def test_scenarios_of_a_growing_cache():
    path = DIALECTS / "torch213_dynamo_qwen2_op18_float32" / "model.onnx"
    if not path.is_file():
        pytest.skip("the shared graphs of other exporters are not here")
    network, graph = open_network(path, device="cpu"), open_graph(path, "onnxruntime")
    scenarios = make_scenarios(random_tokens(network.vocab, 0), None, None)[:2]
    assert compare_decoders(graph, network, scenarios, 1e-5).status == "passed"
