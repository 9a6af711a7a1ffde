"""Quantised graphs: what becomes of the products, what onnxruntime makes of them, and what formats do to text."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from test_surgery import refusal

from suture.core.network.inputs import make_feeds
from suture.core.parts import DECODER, PartFolder
from suture.core.sessions import ROOT_OPTION
from suture.core.weights import load_graph, weights_root
from suture.models.named import checkpoint_folder
from suture.models.tokenizer import open_tokenizer
from suture.runtime.graphs import graph_of, open_graph
from suture.surgery.__main__ import main
from suture.validate.pipeline import PartFiles, Pipeline
from suture.validate.report import make_report, render
from suture.validate.text_level import token_level

LAYERS, CAPACITY = 4, 64  # conftest.quantised
PRODUCTS = 5 * LAYERS + 1


def ops(folder: Path) -> dict[str, int]:
    return json.loads((folder / "report.json").read_text())["ops"]["portable"]


def logits(model: Path, level: ort.GraphOptimizationLevel | None = None, **settings: str) -> np.ndarray:
    """Of a prompt, as validation's references compute them, or in a session of its own."""
    if level is None:
        session = open_graph(model).session
    else:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        for key, value in {ROOT_OPTION: str(weights_root(model)), **settings}.items():
            options.add_session_config_entry(key, value)
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    feeds = make_feeds(load_graph(model))[0].values
    return session.run(["logits"], {value.name: feeds[value.name] for value in session.get_inputs()})[0]


def weights(model: Path) -> dict[str, np.ndarray]:
    """Of each product by its node's name, [in, out], dequantised by numpy from the file's own bytes."""
    proto = onnx.load(model)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            q, scales = (numpy_helper.to_array(tensors[name]).astype(np.float32) for name in node.input[:2])
            block = next((each.i for each in node.attribute if each.name == "block_size"), None)
            found[node.name.removesuffix("/weight")] = q * (np.repeat(scales, block, axis=0) if block else scales)
    return found


def sources(folder: Path) -> dict[str, np.ndarray]:
    """Of each product the weight before it was quantised, [in, out]."""
    proto = onnx.load(folder / "float" / "model.onnx", load_external_data=False)
    onnx.load_external_data_for_model(proto, str(weights_root(folder / "float" / "model.onnx")))
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    return {node.name: numpy_helper.to_array(tensors[node.input[1]]).T for node in proto.graph.node if node.op_type == "Gemm"}


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7)])
def test_weights_are_rounded_to_the_nearest(quantised, name, largest):
    folder = quantised("--quantize", name, "--group-size", "64")
    assert ops(folder)["DequantizeLinear"] == ops(folder)["MatMul"] == PRODUCTS
    assert "Gemm" not in ops(folder)
    found, wanted = weights(folder / "model.onnx"), sources(folder)
    assert found.keys() == wanted.keys()
    for node, weight in wanted.items():
        block, most = (len(weight), 127) if node == "lm_head" or name == "int8" else (64, largest)
        steps = np.abs(weight.reshape(-1, block, weight.shape[1])).max(axis=1, keepdims=True) / most
        error = np.abs(found[node] - weight).reshape(-1, block, weight.shape[1])
        assert (error <= steps * 0.5001).all()
        assert error.max() > 0


def test_references_mean_what_they_say_and_default_sessions_do_not(quantised):
    """The reference's logits are those of the same graph over dequantised weights; a default session's are not, since
    onnxruntime then rounds activations to 8 bits, unless told to be accurate."""
    folder = quantised("--quantize", "int4", "--group-size", "64")
    model = folder / "model.onnx"
    proto = onnx.load(folder / "float" / "model.onnx", load_external_data=False)
    onnx.load_external_data_for_model(proto, str(weights_root(folder / "float" / "model.onnx")))
    dequantised, tensors = weights(model), {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Gemm":
            tensors[node.input[1]].CopyFrom(numpy_helper.from_array(dequantised[node.name].T.copy(), node.input[1]))
    feeds = make_feeds(load_graph(model))[0].values
    session = graph_of(proto, folder, "dequantised").session
    exact = session.run(["logits"], {value.name: feeds[value.name] for value in session.get_inputs()})[0]
    everything = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    largest = np.abs(exact).max()
    assert np.abs(logits(model) - exact).max() < 1e-5 * largest
    assert np.abs(logits(model, everything) - exact).max() > 1e-3 * largest
    accurate = logits(model, everything, **{"session.qdq_matmulnbits_accuracy_level": "1"})
    assert np.abs(accurate - exact).max() < 1e-4 * largest


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_onnxruntime_fuses_every_product(quantised, name, tmp_path):
    model = quantised("--quantize", name, "--group-size", "64") / "model.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node]
    assert found.count("MatMulNBits") == PRODUCTS
    assert "DequantizeLinear" not in found


def test_the_report_shows_what_the_format_costs(quantised, tiny_export):
    folder = quantised("--quantize", "int4", "--group-size", "64")
    source, files = checkpoint_folder("tiny-qwen"), (tiny_export, folder, folder / "float")
    exported, model, before = (each / "model.onnx" for each in files)
    files = PartFiles(PartFolder("decoder", DECODER, folder), exported, model, before, lowered=None, engine=None)
    pipeline = Pipeline((files,), checkpoint=source, text=None, results=None)
    tokenizer, text = open_tokenizer(source), (source / "heldout.txt").read_text(encoding="utf-8")
    portable = open_graph(model, "portable")
    level = token_level(pipeline, portable, tokenizer, tokenizer.encode(text[:4000]))
    cost, (reading,) = level.tokens.cost, level.tokens.readings
    assert cost.before.mean_kl < 1e-6 < 1e-3 < reading.mean_kl
    assert reading.kl_percentiles == sorted(reading.kl_percentiles)
    assert reading.kl_percentiles[99] == pytest.approx(reading.kl_99, rel=1e-4)
    assert 0.15 < cost.bytes["quantised"] / cost.bytes["before"] < 0.3
    html = render(make_report("quantised", [level], {}, 0.0))
    shown = html.split("What quantising costs")[1].split("Greedy continuation")[0]
    assert "int4 in blocks of 64, lm_head int8" in shown
    perplexities = [
        2 ** np.mean(each.bits_by_position[name]) for each, name in ((cost.before, "before"), (reading, "portable"))
    ]
    assert all(f"perplexity {each:.3f}" in shown for each in perplexities)
    level.tokens.cost = None
    assert "What quantising costs" not in render(make_report("plain", [level], {}, 0.0))


def test_what_is_excluded_stays(quantised):
    folder = quantised("--quantize", "int4", "--exclude", "*.h.0.*", "--exclude", "*.h.1.mlp.w?.weight", "--lm-head", "none",
                       "--embedding", "int8")  # fmt: skip
    counts = ops(folder)
    assert counts["Gemm"] == 5 + 2 + 1
    assert counts["DequantizeLinear"] == PRODUCTS - counts["Gemm"] + 1
    assert "Add" in counts  # a bias stays beside its product


def test_one_line_for_what_makes_no_sense(tiny_export, tmp_path, capsys):
    model, out = tiny_export / "model.onnx", ["--out", tmp_path / "out"]
    assert "--exclude nothing*: matches no weight" in refusal(
        capsys, model, *out, "--quantize", "int8", "--exclude", "nothing*"
    )
    assert "add --cache growing" in refusal(capsys, model, *out, "--kv-cache", "int8")
    assert "add --quantize FORMAT" in refusal(capsys, model, *out, "--embedding", "int8")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "too short to calibrate" in refusal(capsys, model, *out, "--quantize", "fp8", "--calibration", short)
    alone = tmp_path / "model.onnx"
    onnx.save(onnx.load(model), alone)
    assert "--tokenizer" in refusal(capsys, alone, *out, "--quantize", "fp8")
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_quantising_says_how_far_it_is(tiny_export, tmp_path, capsys):
    assert main([str(tiny_export / "model.onnx"), "--out", str(tmp_path), "--quantize", "int8"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "writing" in line]
    assert told == ["surgery: writing int8", *(f"surgery: writing int8, {quarter}%" for quarter in (29, 52, 76, 100))]


@pytest.mark.slow
@pytest.mark.parametrize("block", [64, 32, 128])
def test_what_each_format_does_to_text(block, quantised):
    """Divergence on held-out text: int8 far below int4, and AWQ a fifth below rounding to the nearest at every block."""
    folder = checkpoint_folder("tiny-qwen")
    ids = open_tokenizer(folder).encode((folder / "heldout.txt").read_text(encoding="utf-8"))
    tokens = np.array([ids[start : start + CAPACITY] for start in range(0, 12_000, 1_000)])

    def read(model: Path) -> torch.Tensor:
        logits = (
            open_graph(model)
            .decoder(len(tokens))
            .step(tokens, np.full(len(tokens), CAPACITY), np.ones(len(tokens), np.float32))
        )
        return torch.log_softmax(torch.from_numpy(logits).double(), -1)

    exact = read(quantised("--quantize", "int8", "--group-size", "64") / "float" / "model.onnx")

    def divergence(name: str) -> float:
        out = quantised("--quantize", name, "--group-size", str(block))
        return float((exact.exp() * (exact - read(out / "model.onnx"))).sum(-1).mean())

    int4 = divergence("int4")
    assert divergence("int4-awq") < 0.8 * int4 < 0.2
    if block == 64:
        assert 0 < divergence("int8") < 0.02 * int4
