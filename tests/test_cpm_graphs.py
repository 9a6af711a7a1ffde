"""CPM's graphs: a cache of any capacity computes the same, an engine takes the segments, padding is not seen."""

import json
import subprocess
import sys
from pathlib import Path

import build_graphs
import numpy as np
import onnx
import pytest
import torch
from fake_engine import FakeEngine
from onnx.external_data_helper import load_external_data_for_model
from test_export_repeat import differences, plain_ir

from suture.core.cpm_inputs import LAYOUT, MOST_SEGMENTS, made_up
from suture.core.signature import find_signature
from suture.core.weights import load_graph, weights_root
from suture.export.trace import TRACED_LAYERS, trace
from suture.models.architectures import architecture, load_model, open_checkpoint
from suture.runtime.engine import Engine
from suture.runtime.engine_decoder import EngineModel, signature_of
from suture.runtime.graphs import open_graph
from suture.surgery import __main__ as surgery
from suture.surgery.capacity import main as change_capacity
from suture.validate.bundle import _expected
from suture.validate.compare import PASSED, compare
from suture.validate.scenarios import make_scenarios, random_tokens
from tests.families import CAPACITY, FAMILIES, checkpoint, operated
from tests.test_models import levels

ROOT = Path(__file__).parents[1]


def test_rows_have_segments_of_their_own(shared):
    """The portable graph in onnxruntime, two rows with other segments, relations and subscripts, against the module."""
    module = load_model(open_checkpoint(checkpoint("cpmbee", shared)), torch.float32)
    graph = open_graph(operated("cpmbee", "float32", shared) / "surgery" / "model.onnx")
    random = np.random.default_rng(3)
    layout = {"segment_ids": random.integers(0, 5, (2, CAPACITY)), "input_id_subs": random.integers(0, 3, (2, CAPACITY)),
              "segment_relations": random.integers(0, 9, (2, MOST_SEGMENTS, MOST_SEGMENTS))}  # fmt: skip
    tokens, counts = random.integers(3, graph.vocab, (2, 20)), np.array([20, 13])
    decoder = graph.decoder(2)
    decoder.cross(layout)
    found = decoder.step(tokens, counts, np.ones(2, np.float32))
    mask = torch.arange(20)[None, :] < torch.from_numpy(counts)[:, None]
    past = [torch.zeros(2, 4, 0, 16)] * 4
    given = (torch.from_numpy(layout[name]) for name in LAYOUT)
    positions = torch.arange(20).expand(2, -1)
    expected, _ = module(torch.from_numpy(tokens), positions, mask.long(), past, *given)
    np.testing.assert_allclose(found[mask.numpy()], expected[mask].numpy(), atol=2e-5)


def test_an_engine_is_told_the_segments(shared, tmp_path):
    """A stand-in for the engine, stepped here and from a bundle's arrays, agrees with onnxruntime in every scenario."""
    path = operated("cpmbee", "float32", shared) / "surgery" / "model.onnx"
    graph, proto = open_graph(path), load_graph(path)
    load_external_data_for_model(proto, str(weights_root(path)))
    description = build_graphs.describe(proto)
    engine = Engine(tmp_path / "model.engine", description, tmp_path, FakeEngine(proto), device="cpu")
    model = EngineModel("engine", signature_of(description), engine)
    assert signature_of(description) == graph.signature
    scenarios = make_scenarios(random_tokens(graph.vocab, 0), graph.capacity, None)
    comparison = compare(graph, model, scenarios)
    assert comparison.status == PASSED, [scenario.reason for scenario in comparison.scenarios]
    arrays = _expected(graph, scenarios[3], 0)
    assert {key for key in arrays if "/constant/" in key} == {f"0/constant/{name}" for name in LAYOUT}
    for key, value in arrays.items():
        if "segment_ids" in key:
            np.testing.assert_array_equal(value, made_up(("segment_ids",), 3, CAPACITY)["segment_ids"])


@pytest.mark.every
@pytest.mark.parametrize(("name", "dtype"), [("cpmant", "float16"), ("cpmbee", "bfloat16")])
def test_half_precision_agrees_and_builds(name, dtype, shared, tmp_path):
    """In bfloat16 a constant such as CPM-Bee's 1.05 would be far off."""
    out = operated(name, dtype, shared)
    assert [level["status"] for level in levels(out)[:3]] == [PASSED] * 3
    command = [sys.executable, "-m", "suture.build", str(out / "surgery" / "model.trt.onnx"), "--out", str(tmp_path)]
    subprocess.run([*command, "--compute-capability", "8.9"], cwd=ROOT, check=True, capture_output=True)
    description = json.loads((tmp_path / "engine.json").read_text())
    assert description["signature"]["bidirectional"]
    assert {tensor["role"] for tensor in description["inputs"]} >= {"sequence_lengths", "positions"}


@pytest.mark.every
@pytest.mark.parametrize("name", ["cpmant", "cpmbee"])
def test_a_deep_one_is_the_whole_trace(name, tmp_path):
    config = {"model_type": name, **FAMILIES[name].config, "num_hidden_layers": 5}  # one more than are traced
    repeated = trace(architecture(config, tmp_path), torch.float32)
    whole = trace(architecture(config, tmp_path), torch.float32, whole=True)
    assert [graph.metadata_props[TRACED_LAYERS] for graph in (repeated, whole)] == ["4", "5"]
    assert differences(plain_ir(whole), plain_ir(repeated)) == []


@pytest.mark.parametrize("name", ["cpmant", "cpmbee"])
@pytest.mark.sample("cpmbee")
def test_another_capacity_and_the_last_logits_compute_the_same(name, shared, tmp_path):
    out = operated(name, "float32", shared)
    change_capacity([str(out / "surgery"), "--capacity", "50", "--out", str(tmp_path / "50")])
    exported = out / "export" / "model.onnx"
    surgery.main([str(exported), "--out", str(tmp_path / "last"), "--capacity", "50", "--logits", "last"])
    made = open_graph(out / "surgery" / "model.onnx")
    assert not made.last_only
    scenarios = make_scenarios(random_tokens(made.vocab, 0), 50, None, prefix=made.prefix)
    for folder in ("50", "last"):
        changed = open_graph(tmp_path / folder / "model.onnx")
        assert (changed.capacity, changed.last_only) == (50, folder == "last")
        assert list(changed.signature.prefix) == list(made.prefix)
        assert compare(made, changed, scenarios).status == PASSED


def test_what_a_step_is_padded_with_is_not_seen(shared):
    """Beside a longer row, and over a cache full of noise, a row gets the logits that it gets alone."""
    graph = open_graph(operated("cpmant", "float32", shared) / "surgery" / "model.onnx")
    tokens = np.random.default_rng(0).integers(3, graph.vocab, (2, 20))
    together = graph.decoder(2).step(tokens, np.array([20, 9]), np.ones(2, np.float32))
    alone = graph.decoder(1).step(tokens[1:, :9], np.array([9]), np.ones(1, np.float32))
    np.testing.assert_allclose(together[1, :9], alone[0], atol=2e-5)
    longer = graph.decoder(1).step(tokens[1:, :10], np.array([10]), np.ones(1, np.float32))
    assert np.abs(longer[0, :9] - alone[0]).max() > 1e-3  # a token of its own is


def test_a_graph_that_does_not_say_so_stays_as_it_is(shared, tmp_path):
    """A mask of padding alone over a bias is understood only where the graph says that a prompt comes in one step."""
    model = onnx.load(operated("cpmant", "float32", shared) / "export" / "model.onnx")
    kept = [entry for entry in model.metadata_props if entry.key != "suture.bidirectional"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "model.onnx")
    surgery.main([str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out")])
    assert "the mask adds numbers that are not a slope times a distance" in (tmp_path / "out" / "report.json").read_text()
    assert not find_signature(onnx.load(tmp_path / "out" / "model.onnx")).static
