"""tiny-qwen's golden outputs, reproduced by PyTorch, by the exported graph and by the portable graph.

The goldens were made by tests/golden/make.py; a change that moves a logit by more than rounding fails here first.
"""

import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from suture.core.signature import find_signature
from suture.core.weights import load_graph, references
from suture.models.architectures import load_model, open_checkpoint
from tests.golden.make import CHECKPOINT, GOLDEN, KEPT, greedy

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-4  # of the largest value
CASES = ("short", "long")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def portable(tiny_portable) -> Path:
    return tiny_portable / "model.onnx"


def run_graph(path: Path, prompt: np.ndarray, decoded: np.ndarray, alpha: np.ndarray) -> dict[str, np.ndarray]:
    """One row without padding through a growing or a static graph, fed the golden tokens: logits and cache ends."""
    signature = find_signature(load_graph(path))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    slots = signature.capacity if signature.static else 0
    caches = {
        cache.past: np.zeros((1, signature.kv_heads, slots, signature.head_dim), np.float32) for cache in signature.caches
    }
    done, logits = 0, []
    for tokens in [prompt, *decoded[:-1].reshape(-1, 1, 1)]:
        feeds = {signature.tokens: tokens, signature.positions: done + np.arange(tokens.shape[1])[None]}
        if signature.static:
            feeds[signature.write_indices] = np.array([done])
        else:
            feeds[signature.mask] = np.ones((1, done + tokens.shape[1]), np.int64)
        names = [signature.logits, *(cache.present for cache in signature.caches)]
        out, *presents = session.run(names, feeds | caches | {signature.ntk_alpha: alpha})
        caches = {cache.past: present for cache, present in zip(signature.caches, presents)}
        logits.append(out[0, -KEPT if done == 0 else -1 :])
        done += tokens.shape[1]
    return {
        "logits": np.concatenate(logits),
        "cache_ends": np.stack([caches[cache.past][0, :, done - 1] for cache in signature.caches]),
    }


def error(golden: dict[str, np.ndarray], case: str, found: dict[str, np.ndarray]) -> float:
    """The largest difference of logits and caches, of the largest golden value; NaN counts as infinite."""
    worst = 0.0
    for key in ("logits", "cache_ends"):
        expected = golden[f"{case}_{key}"]
        assert found[key].shape == expected.shape
        difference = np.abs(found[key] - expected).max() / np.abs(expected).max()
        worst = max(worst, float("inf") if np.isnan(difference) else float(difference))
    return worst


def run_case(path: Path, golden: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    return run_graph(path, golden[f"{case}_prompt"], golden[f"{case}_decoded"], golden[f"{case}_alpha"])


def test_the_long_case_lies_where_ntk_and_logn_act(golden):
    assert golden["short_alpha"].item() == 1
    assert golden["long_alpha"].item() > 1
    assert golden["long_prompt"].shape[1] > 256


@pytest.mark.parametrize("case", CASES)
def test_pytorch(golden, case):
    found = greedy(load_model(open_checkpoint(CHECKPOINT), torch.float32), golden[f"{case}_prompt"])
    assert found["decoded"].tolist() == golden[f"{case}_decoded"].tolist()
    assert error(golden, case, found) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_exported_graph(golden, case, tiny_export):
    assert error(golden, case, run_case(tiny_export / "model.onnx", golden, case)) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_portable_graph(golden, case, portable):
    found = run_case(portable, golden, case)
    assert error(golden, case, found) <= TOLERANCE
    assert found["logits"][KEPT - 1 :].argmax(-1).tolist() == golden[f"{case}_decoded"].tolist()


@pytest.mark.parametrize("weight", ["transformer.h.2.attn.c_proj.weight", "transformer.h.0.ln_1.weight"])
def test_a_disturbed_weight_of_one_layer_fails(golden, portable, tmp_path, weight):
    """One weight of one layer off by a thousandth of its size is seen."""
    for file in ("model.onnx", "model.safetensors"):
        shutil.copy(portable.parent / file, tmp_path / file)
    place = next(ref for tensor, ref in references(load_graph(portable)) if tensor.name == weight)
    offset, length = int(place["offset"]), int(place["length"])
    weights = np.memmap(tmp_path / "model.safetensors", np.float32, "r+", offset, length // 4)
    weights *= 1.001
    weights.flush()
    assert error(golden, "short", run_case(tmp_path / "model.onnx", golden, "short")) > TOLERANCE
