"""What a query's rows are is what the graph computes them from: tokens of the step, or heads that share a key head."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan
from tests.graphs import grouped_rows
from tests.graphs.grouped_rows import CAUSAL, LAST

CASES = Path(__file__).parent / "graphs" / "cases"
CAPACITY = 32
STEPS = ((1, 1, 0), (1, 1, 5), (2, 1, 1), (3, 1, 11), (2, 3, 0), (1, 3, 6))  # batch, tokens, past


def run(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [value.name for value in session.get_inputs()]
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, {name: feeds[name] for name in names})))


def errors(source: onnx.ModelProto, portable: onnx.ModelProto, tokens: int) -> list[float]:
    """The logits' largest error in each step that the source can run, of the largest logit. Empty slots hold noise."""
    sessions, random = (
        [ort.InferenceSession(model.SerializeToString()) for model in (source, portable)],
        np.random.default_rng(0),
    )
    pasts = [[value for value in session.get_inputs() if "past" in value.name] for session in sessions]
    found = []
    for batch, steps, past in STEPS:
        if steps > tokens:
            continue
        feeds = {"input_ids": random.integers(0, 32, (batch, steps)), "write_indices": np.full(batch, past)}
        feeds["attention_mask"] = np.ones((batch, past + steps), np.int64)
        feeds["position_ids"] = past + np.tile(np.arange(steps), (batch, 1))
        growing, ours = dict(feeds), dict(feeds)
        for one, other in zip(*pasts):
            cache = random.standard_normal((batch, one.shape[1], CAPACITY, one.shape[3])).astype(np.float32)
            growing[one.name] = cache[:, :, :past]
            ours[other.name] = cache if other.shape[2] == CAPACITY else cache[:, :, :past]
        expected, got = run(sessions[0], growing)["logits"], run(sessions[1], ours)["logits"]
        found.append(float(np.abs(expected - got).max() / np.abs(expected).max()))
    return found


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_a_grouped_query_decoder_traced_with_one_token(cache):
    """Its query is [B, kv_heads, heads of a group, D], its mask of one row."""
    path = CASES / "one_token_llama31.onnx"
    portable, _, report = run_plan(files.read(path), make_plan(SurgeryOptions(cache=cache, capacity=CAPACITY)))
    attentions = portable.nodes("Attention")
    assert [node.inputs[0].shape[1] for node in attentions] == [4, 4]
    assert [node.inputs[1].shape[1] for node in attentions] == [2, 2]
    assert len(portable.nodes("TensorScatter")) == (4 if cache == "static" else 0)
    assert not report.unfused
    found = errors(onnx.load(path), files.to_model(portable), tokens=1)
    assert len(found) == 4
    assert max(found) < 1e-5


FORMS = [  # query, mask, heads of the query, whether its cache becomes static
    ("heads of a group", CAUSAL, 4, True),
    ("heads of a group", LAST, 4, False),
    ("a projection seen as groups", CAUSAL, 2, False),
    ("a projection seen as groups", LAST, 2, False),
    ("tokens", CAUSAL, 4, True),
    ("tokens", LAST, 4, False),
]


@pytest.mark.parametrize(("query", "mask", "heads", "static"), FORMS)
def test_rows_of_other_kinds(query, mask, heads, static, tmp_path):
    """A mask of one row hides the same of all rows: over tokens it is not causal."""
    source, tokens = grouped_rows.decoder(query, mask), 3 if query == "tokens" else 1
    onnx.checker.check_model(source)
    onnx.save(source, tmp_path / "model.onnx")
    for cache in ("growing", "static"):
        portable, _, report = run_plan(
            files.read(tmp_path / "model.onnx"), make_plan(SurgeryOptions(cache=cache, capacity=CAPACITY))
        )
        (attention,) = portable.nodes("Attention")
        assert attention.inputs[0].shape[1] == heads
        assert attention.inputs[1].shape[1] == grouped_rows.KV_HEADS
        assert len(portable.nodes("TensorScatter")) == (2 if static and cache == "static" else 0)
        assert bool(report.unfused) == (cache == "static" and not static)
        found = errors(source, files.to_model(portable), tokens)
        assert len(found) == (6 if tokens == 3 else 4)
        assert max(found) < 1e-5


def test_a_cache_that_an_unknown_attention_reads_keeps_growing(tmp_path):
    """Its scores are an output: over a static cache they would be others."""
    onnx.save(grouped_rows.decoder("tokens"), tmp_path / "model.onnx")
    portable, _, _ = run_plan(
        files.read(tmp_path / "model.onnx"), make_plan(SurgeryOptions(cache="growing", capacity=CAPACITY))
    )
    model = files.to_model(portable)
    (attention,) = [node for node in model.graph.node if node.op_type == "Attention"]
    second = onnx.helper.make_node("Attention", attention.input[:4], ["again", "", "", "scores"], name="second")
    second.attribute.extend(attention.attribute)
    model.graph.node.append(second)
    model.graph.output.append(onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, [None] * 4))
    onnx.save(model, tmp_path / "model.onnx")
    portable, _, report = run_plan(files.read(tmp_path / "model.onnx"), make_plan(SurgeryOptions(capacity=CAPACITY)))
    assert not portable.nodes("TensorScatter")
    assert any("static_cache: its output qk_matmul_output" in line for line in report.lines())
    assert any("its output qk_matmul_output is not accounted for" in line for line in report.lines())
