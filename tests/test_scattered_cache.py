"""Graphs whose cache is static already, written by a scatter: index_copy_ as torch's exporters write it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from tests import decoding
from tests.decoding import SCHEDULE, decode, largest_error
from tests.graphs import weightless
from tests.test_surgery_families import DECOMPOSED, FUSED, counts, llama, operated

GRAPHS = (
    "static/qwen2-dynamo-18-float32",
    "static/qwen2-torchscript-17-float32",
)  # ScatterND between Transposes, ScatterElements


def decode_static(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """What tests.decoding.decode gives, of a graph whose caches the input past_length says how full they are."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pasts = [each for each in session.get_inputs() if each.name.startswith("past_") and len(each.shape) == 4]
    dtype = np.float16 if pasts[0].type == "tensor(float16)" else np.float32
    random, schedule = np.random.default_rng(0), np.array(SCHEDULE)
    tokens = [random.integers(3, session.get_outputs()[0].shape[-1], total) for total in schedule.sum(axis=0)]
    logits, slots = [], [[] for _ in pasts]
    for row, sequence in enumerate(tokens):
        caches = {each.name: random.normal(size=(1, *each.shape[1:])).astype(dtype) for each in pasts}
        full = 0
        for count in schedule[:, row]:
            if not count:
                continue
            step = {"input_ids": sequence[None, full : full + count], "past_length": np.array(full)}
            step["position_ids"] = full + np.arange(count)[None]
            names = [each.name for each in session.get_inputs()]
            result, *presents = session.run(None, {name: (step | caches)[name] for name in names})
            caches = {each.name: present for each, present in zip(pasts, presents)}
            full += count
            logits.append(result[0])
        for place, cache in zip(slots, caches.values()):
            place.append(cache[0, :, :full].swapaxes(0, 1))
    kinds = [f"{layer}.{role}" for layer in range(len(pasts) // 2) for role in ("key", "value")]
    return {"logits": np.concatenate(logits).astype(np.float32)} | {
        kind: np.concatenate(each).astype(np.float32) for kind, each in zip(kinds, slots)
    }


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("cache", ["static", "growing"])
def test_scatters_become_cache_updates(name, cache, tmp_path):
    source = weightless.load(name)
    portable, report = operated(source, tmp_path, cache)
    expected = llama if cache == "static" else {op: count for op, count in llama.items() if op != "TensorScatter"}
    assert counts(portable, FUSED) == expected
    assert counts(portable, (*DECOMPOSED, "ScatterND", "ScatterElements")) == {}
    assert report.unfused == []
    names = {value.name for value in portable.graph.input}
    assert "past_length" not in names
    assert ("write_indices" in names) == (cache == "static")
    onnx.checker.check_model(portable, full_check=True)
    assert largest_error(decode_static(source), decode(portable, alone=cache == "growing")) < 1e-4


@pytest.mark.slow  # the others read stored ones
def test_a_fresh_export(tmp_path):
    script, out = Path(decoding.__file__).parent / "graphs" / "export.py", tmp_path / "static.onnx"
    command = [sys.executable, script, "qwen3", "torchscript", "17", "float32", out, "static"]
    subprocess.run(command, check=True, capture_output=True)
    source = onnx.load(out)
    portable, report = operated(source, tmp_path)
    assert counts(portable, FUSED) == llama | {"RMSNormalization": 9}
    assert report.unfused == []
    assert largest_error(decode_static(source), decode(portable, alone=False)) < 1e-4


def node_of(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_mask_that_is_not_causal_is_kept(name, tmp_path):
    """Less in place of LessOrEqual: no token sees itself."""
    source = weightless.load(name)
    for node in source.graph.node:
        node.op_type = "Less" if node.op_type == "LessOrEqual" else node.op_type
    portable, report = operated(source, tmp_path)
    assert counts(portable, ("TensorScatter", "Attention")) == {"Attention": 2}
    assert any("the mask over the static cache is not causal" in each["reason"] for each in report.unfused)


def test_a_scatter_elsewhere_is_kept(tmp_path):
    """Written one slot late: no update from `past_length` on."""
    source = weightless.load(GRAPHS[0])
    scatter = node_of(source, "ScatterND")
    place = list(source.graph.node).index(scatter)
    source.graph.initializer.append(numpy_helper.from_array(np.array(1), "late_by"))
    source.graph.node.insert(place, helper.make_node("Add", [scatter.input[1], "late_by"], ["late"]))
    source.graph.node[place + 1].input[1] = "late"
    portable, report = operated(source, tmp_path)
    assert counts(portable, ("TensorScatter", "Attention")) == {"Attention": 2}
    reasons = [miss.reason for each in report.passes if each.name == "scattered_cache" for miss in each.near_misses]
    assert reasons == ["the scatter does not write the step's tokens one slot after the other, all rows alike"]


def test_caches_are_paired_by_their_scatter(tmp_path):
    """Names that say nothing, and transpositions between."""
    source = weightless.load(GRAPHS[0])
    kinds = [f"{kind}_{layer}" for layer in range(2) for kind in "kv"]
    names = {f"past_{kind}": f"buffer_{i}" for i, kind in enumerate(kinds)}
    names |= {f"present_{kind}": f"output_{7 * i % 5}" for i, kind in enumerate(kinds)}
    for value in (*source.graph.input, *source.graph.output):
        value.name = names.get(value.name, value.name)
    for node in source.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    portable, _ = operated(source, tmp_path)
    assert counts(portable, FUSED) == llama
    assert largest_error(decode_static(weightless.load(GRAPHS[0])), decode(portable, alone=False)) < 1e-4
