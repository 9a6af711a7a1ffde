"""Decoders that take embeddings in place of token ids, with one position a token or three (mrope), through surgery."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import weightless
from onnx import helper, numpy_helper

from suture.core.errors import UserError
from suture.core.network.inputs import make_feeds
from suture.core.signature import find_signature
from suture.core.step_inputs import position_values, token_values
from suture.runtime.graphs import open_graph
from suture.runtime.network_decoder import open_network
from suture.surgery.__main__ import main
from suture.validate.levels import compare_graphs

ROOT = Path(__file__).parents[1]
NAMES = ("qwen2-dynamo-18", "qwen2-torchscript-17", "qwen25vl-dynamo-18", "qwen25vl-torchscript-17")
FUSED = {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4, "Swish": 2, "Gemm": 15}
TOLERANCE, CAPACITY = 1e-5, 64


def load(name: str) -> onnx.ModelProto:
    return weightless.load(f"embeddings/{name}")


@pytest.fixture(scope="module")
def operated(tmp_path_factory):
    """The folder of surgery on a graph, made once for each of its caches; every pass verified."""
    made = {}

    def run(name: str, cache: str) -> Path:
        if (name, cache) not in made:
            folder = tmp_path_factory.mktemp(name)
            onnx.save(load(name), folder / "source.onnx")
            static = ["--capacity", str(CAPACITY)] if cache == "static" else ["--cache", "growing"]
            assert main([str(folder / "source.onnx"), "--out", str(folder / "surgery"), "--verify", *static]) == 0
            made[name, cache] = folder
        return made[name, cache]

    return run


IN_EACH_RUN = [("qwen2-dynamo-18", "growing"), ("qwen25vl-dynamo-18", "static")]


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        pytest.param(name, cache, marks=[] if (name, cache) in IN_EACH_RUN else [pytest.mark.slow])
        for name in NAMES for cache in ("static", "growing")
    ],
)  # fmt: skip
@pytest.mark.sample("qwen25vl*")
def test_fuses_all_and_changes_nothing(operated, name, cache):
    folder = operated(name, cache)
    portable = onnx.load(folder / "surgery" / "model.onnx")
    ops = [node.op_type for node in portable.graph.node]
    assert {op: ops.count(op) for op in FUSED} == FUSED
    assert ops.count("TensorScatter") == (4 if cache == "static" else 0)
    report = json.loads((folder / "surgery" / "report.json").read_text())
    assert report["unfused"] == []
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in portable.graph.input
    }
    assert shapes["inputs_embeds"] == ["batch", "sequence", 64]
    assert shapes["position_ids"] == ([3] if "vl" in name else []) + ["batch", "sequence"]
    assert ("attention_mask" in shapes) == (cache == "growing")
    graphs = open_graph(folder / "source.onnx"), open_graph(folder / "surgery" / "model.onnx")
    prompts_and_decoding = compare_graphs(*graphs, TOLERANCE)
    assert prompts_and_decoding.status == "passed", prompts_and_decoding
    network = open_network(folder / "surgery" / "model.trt.onnx")
    assert compare_graphs(graphs[1], network, TOLERANCE).status == "passed"


@pytest.mark.seconds
def test_a_graph_that_reads_one_row_of_positions_is_another(operated, tmp_path):
    folder = operated("qwen25vl-dynamo-18", "static")
    changed = onnx.load(folder / "surgery" / "model.onnx")
    for node in changed.graph.node:
        node.input[:] = ["first_row" if name == "position_ids" else name for name in node.input]
    changed.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.int64), "first"))
    changed.graph.node.insert(0, helper.make_node("Gather", ["position_ids", "first"], ["first_row"], axis=0))
    onnx.save(changed, tmp_path / "model.onnx")
    level = compare_graphs(open_graph(folder / "source.onnx"), open_graph(tmp_path / "model.onnx"), TOLERANCE)
    assert level.status == "different"
    assert level.comparison.worst.error > 1e-3


def test_made_up_positions_are_a_texts_with_pictures():
    signature = find_signature(load("qwen25vl-dynamo-18"))
    assert (signature.tokens, signature.embedding_width, signature.position_rows) == ("inputs_embeds", 64, 3)
    temporal, height, width = position_values(signature, np.arange(10)[None])
    assert temporal[0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 8, 9]
    assert height[0].tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 8, 9]
    assert width[0].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 8, 9]
    assert (position_values(signature, np.arange(10)[None], text=True) == np.arange(10)).all()
    values = token_values(signature, np.array([[3, 5, 3]]))
    assert values.shape == (1, 3, 64)
    assert (values[0, 0] == values[0, 2]).all()
    assert (values[0, 0] != values[0, 1]).mean() > 0.9


def test_made_up_inputs_of_the_network_command_are_of_the_graphs_types():
    for name in NAMES:
        for feeds in make_feeds(load(name)):
            assert feeds.values["inputs_embeds"].dtype == np.float32
            assert feeds.values["position_ids"].shape[:-2] == ((3,) if "vl" in name else ())


def test_embeddings_without_a_fixed_width_are_refused(tmp_path):
    model = load("qwen2-dynamo-18")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "hidden"
    with pytest.raises(UserError, match=r"inputs_embeds is \['.*', '.*', 'hidden'\], not \[batch, sequence, a fixed width\]"):
        find_signature(model)


def test_an_engine_is_built(operated):
    folder = operated("qwen25vl-dynamo-18", "static")
    command = [sys.executable, "-m", "suture.build", folder / "surgery" / "model.trt.onnx", "--out", folder / "build",
               "--compute-capability", "8.9"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    engine = json.loads((folder / "build" / "engine.json").read_text())
    shapes = engine["profiles"][-1]["shapes"]
    assert shapes["inputs_embeds"][2][1:] == [CAPACITY, 64]
    assert shapes["position_ids"][2] == [3, *shapes["inputs_embeds"][2][:2]]
    assert {tensor["name"]: tensor["role"] for tensor in engine["inputs"]}["inputs_embeds"] == "tokens"
