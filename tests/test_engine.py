"""runtime/engine.py without a GPU, on an execution context that computes with onnxruntime."""

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

from suture.core.signature import find_signature
from suture.runtime import engine as engines
from suture.runtime.engine import Engine, EngineSession, choose_profile, read_weight, takes, why_not
from suture.runtime.engine_decoder import EngineModel, signature_of
from suture.runtime.graphs import graph_of
from suture.validate.compare import DIFFERENT, PASSED, compare
from suture.validate.scenarios import make_scenarios, random_tokens

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def portable() -> onnx.ModelProto:
    return build_graphs.portable_decoder()


@pytest.fixture
def description(portable) -> dict:
    return build_graphs.describe(portable)


@pytest.fixture
def engine(portable, description, tmp_path) -> Engine:
    return Engine(tmp_path / "model.engine", description, tmp_path, FakeEngine(portable), device="cpu")


def feeds(tokens, start: int) -> dict[str, np.ndarray]:
    tokens = np.atleast_2d(np.array(tokens, np.int64))
    positions = start + np.arange(tokens.shape[1]) + np.zeros_like(tokens)
    return {"input_ids": tokens, "position_ids": positions, "write_indices": np.full(len(tokens), start, np.int64)}


def test_engine_agrees_with_onnxruntime_in_every_scenario(portable, engine, description, tmp_path):
    reference = graph_of(portable, tmp_path, "portable")
    candidate = EngineModel("engine", signature_of(description), engine)
    scenarios = make_scenarios(random_tokens(reference.vocab, 0), reference.capacity, None)
    comparison = compare(reference, candidate, scenarios)
    assert comparison.status == PASSED, [scenario.reason for scenario in comparison.scenarios]
    assert len(comparison.scenarios) == 6
    assert {context.profile for context in engine.engine.contexts} == {0, 1}


def test_a_cache_bound_to_another_buffer_is_different(portable, engine, description, tmp_path):
    for tensor in engine.description["outputs"]:
        if tensor["name"] == "present.0.key":
            tensor["same_buffer_as"] = "past_key_values.0.value"
    reference = graph_of(portable, tmp_path, "portable")
    scenarios = make_scenarios(random_tokens(reference.vocab, 0), reference.capacity, None)
    assert compare(reference, EngineModel("engine", signature_of(description), engine), scenarios[2:3]).status == DIFFERENT


def test_buffers_keep_their_addresses_and_caches_are_one_buffer(engine):
    session = EngineSession(engine, 1)
    session.run(feeds([5, 6, 7], 0))
    first = session.run(feeds([8], 3))
    before = dict(engine.contexts[0].addresses)
    session.run(feeds([9], 4))
    decode = engine.contexts[0].addresses
    assert decode == before
    assert decode["past_key_values.0.key"] == decode["present.0.key"] == session.caches["past_key_values.0.key"].data_ptr()
    assert engine.contexts[1].addresses["present.0.key"] == decode["present.0.key"]
    assert first.shape == (1, 1, build_graphs.VOCABULARY)


def test_sessions_of_two_batches_take_turns(engine):
    alone, pair = EngineSession(engine, 1), EngineSession(engine, 2)
    expected = alone.run(feeds([5, 6, 7], 0))[0]
    both = pair.run(feeds([[1, 2, 3], [5, 6, 7]], 0))
    np.testing.assert_allclose(both[1], expected, atol=1e-5)
    again = alone.run(feeds([8], 3))
    np.testing.assert_allclose(pair.run(feeds([[4], [8]], 3))[1], again[0], atol=1e-5)


def test_profiles_by_shape(description):
    shape = {name: tuple(largest) for name, (_, _, largest) in description["profiles"][0]["shapes"].items()}
    assert choose_profile(description, shape) == 0
    assert choose_profile(description, {**shape, "input_ids": (4, 16), "position_ids": (4, 16)}) == 1
    with pytest.raises(ValueError, match=r"no profile of the engine allows input_ids \(4, 65\)"):
        choose_profile(description, {**shape, "input_ids": (4, 65), "position_ids": (4, 65)})
    assert (takes(description, 4, 64), takes(description, 5, 1), takes(description, 1, 65)) == (True, False, False)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_weights_are_read_from_their_file(dtype, tmp_path):
    values = torch.randn(6, 4).to(getattr(torch, dtype))
    raw = values.view(torch.uint8).numpy().tobytes()
    (tmp_path / "weights").write_bytes(b"head!" + raw + b"tail")  # at an odd offset, as safetensors may have them
    weight = {"name": "w", "file": "weights", "offset": 5, "bytes": len(raw), "dtype": dtype, "shape": [6, 4]}
    assert torch.equal(read_weight(weight, tmp_path), values)
    with pytest.raises(ValueError, match=r"weight w: 24 values in weights, not \[6, 5\]"):
        read_weight({**weight, "shape": [6, 5]}, tmp_path)


def test_weights_that_are_inputs_are_bound(portable, description, tmp_path):
    model = onnx.ModelProto()
    model.CopyFrom(portable)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "0.down.weight")
    value = onnx.numpy_helper.to_array(tensor)
    (tmp_path / "down").write_bytes(value.tobytes())
    model.graph.initializer.remove(tensor)
    model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    description["weights"]["inputs"] = [
        {
            "name": tensor.name,
            "file": "down",
            "offset": 0,
            "bytes": value.nbytes,
            "dtype": "float32",
            "shape": list(value.shape),
        }
    ]
    whole = Engine(tmp_path / "model.engine", build_graphs.describe(portable), tmp_path, FakeEngine(portable), device="cpu")
    bound = Engine(tmp_path / "model.engine", description, tmp_path, FakeEngine(model), device="cpu")
    bound.context(0, 0).shapes[tensor.name] = bound.context(1, 0).shapes[tensor.name] = value.shape  # fixed, so not set
    expected = EngineSession(whole, 1).run(feeds([5, 6, 7], 0))
    np.testing.assert_array_equal(EngineSession(bound, 1).run(feeds([5, 6, 7], 0)), expected)


def test_why_an_engine_cannot_run(description, monkeypatch):
    assert why_not(description) == "there is no GPU that torch can use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert why_not(description) == "this GPU has compute capability 9.0, and the engine is for 8.9"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert why_not(description) is None
    other = {**description, "tensorrt": {"flavour": "rtx", "version": "0.1"}}
    assert why_not(other).startswith("it was built with tensorrt_rtx 0.1, and 1.")
    monkeypatch.setitem(engines.MODULES, "rtx", "no_such_tensorrt")
    assert why_not(description) == "no_such_tensorrt cannot be imported"
    for tensor in description["inputs"]:
        tensor.pop("same_buffer_as", None)
    assert "its caches grow" in why_not(description)


def test_the_runner_knows_what_build_writes(tmp_path):
    """engine.json as `python -m build` really writes it, for a graph that is a decoder."""
    model = build_graphs.decoder()
    onnx.save(model, tmp_path / "model.trt.onnx")
    command = [
        sys.executable,
        "-m",
        "suture.build",
        tmp_path / "model.trt.onnx",
        "--out",
        tmp_path / "out",
        "--compute-capability",
        "8.9",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    written = json.loads((tmp_path / "out" / "engine.json").read_text())
    assert signature_of(written) == find_signature(model)
    engine = Engine(tmp_path / "out" / "model.engine", written, tmp_path, FakeEngine(None), device="cpu")
    session = EngineSession(engine, 3)
    assert session.caches["past_key_values.0.key"].shape == (3, 4, 64, 32)
    assert session.caches["past_key_values.0.key"].dtype == torch.float16
    assert takes(written, 4, 64)
    assert why_not(written) == "there is no GPU that torch can use"
