"""What stops a build: each in one line that says what and where, and with nothing left behind."""

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import build_graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from processes import started
from test_build import job, run_build, saved

from suture.build import flavour, worker
from suture.build.process import build
from suture.build.profiles import make_profiles
from suture.build.worker import Job
from suture.core.command import INTERRUPTED
from suture.core.errors import UserError
from suture.core.network.graph_audit import audit_graph
from suture.core.signature import find_signature


def fails_with(proto: onnx.ModelProto, folder: Path, *options: str) -> str:
    """The one line that a build of `proto` ends with."""
    result = run_build(saved(proto, folder), folder / "out", *options)
    assert result.returncode == 2, result.stderr
    assert not list((folder / "out").glob("**/*"))
    (line,) = result.stderr.splitlines()
    assert str(folder) in line
    return line


def test_truncated_weights(tmp_path):
    model = build_graphs.by_reference(build_graphs.decoder(), tmp_path / "surgery", tmp_path / "checkpoint")
    os.truncate(tmp_path / "checkpoint" / "model.safetensors", 100_000)
    result = run_build(model, tmp_path / "out")
    assert (result.returncode, "truncated" in result.stderr) == (2, True)


def test_dropped_lengths_stop_the_build(tmp_path):
    line = fails_with(build_graphs.decoder(attention="nonpad"), tmp_path)
    assert "attention_0" in line
    assert "nonpad_kv_seqlen" in line
    assert "surgery" in line


def test_what_the_parser_drops_is_found_in_the_network_too(tmp_path):
    proto = build_graphs.decoder(attention="nonpad")
    lengths = next(node for node in proto.graph.node if node.op_type == "Attention").input[6]
    with pytest.raises(UserError, match="no layer takes it: the parser dropped it from attention_0"):
        build(job(proto, tmp_path))
    node = next(node for node in proto.graph.node if lengths in node.output)
    proto.graph.node.remove(node)
    proto.graph.input.append(helper.make_tensor_value_info(lengths, TensorProto.INT64, ["batch"]))
    with pytest.raises(
        UserError, match=f"input {lengths}: no output of the network depends on it: the parser dropped it from attention_0"
    ):
        build(job(proto, tmp_path))


def test_causal_attention_over_a_cache_stops_the_build(tmp_path):
    assert "attention_0: is_causal" in fails_with(build_graphs.decoder(attention="causal"), tmp_path)


def test_causal_attention_without_a_cache_is_no_finding():
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 4, 8, 32]) for name in "qkv"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)
    assert audit_graph(build_graphs.model([node], values, values[:0]), Path()) == []


def test_an_unused_input_stops_the_build_and_an_unused_weight_is_a_warning(tmp_path):
    proto = build_graphs.decoder()
    proto.graph.input.append(helper.make_tensor_value_info("kv_lengths", TensorProto.INT64, ["batch"]))
    assert "input kv_lengths: nothing in the graph uses it" in fails_with(proto, tmp_path)
    proto.graph.input.pop()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(3), "forgotten"))
    result = run_build(saved(proto, tmp_path), tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "build: warning: weight forgotten: nothing in the graph uses it" in result.stdout


def test_foreign_domain_stops_the_build(tmp_path):
    proto = build_graphs.decoder()
    next(node for node in proto.graph.node if node.op_type == "RMSNormalization").domain = "some.vendor"
    proto.opset_import.append(helper.make_opsetid("some.vendor", 1))
    assert "some.vendor::RMSNormalization" in fails_with(proto, tmp_path)


@pytest.mark.parametrize("end", ["past_key_values.0.value", "present.0.value"])
def test_cache_update_that_is_not_at_the_ends_stops_the_build(end, tmp_path):
    proto = build_graphs.decoder()
    for node in proto.graph.node:
        node.input[:] = ["between" if name == end else name for name in node.input]
        node.output[:] = ["between" if name == end else name for name in node.output]
    ends = (end, "between") if end.startswith("past") else ("between", end)
    proto.graph.node.append(helper.make_node("Identity", [ends[0]], [ends[1]], name="copy"))
    with pytest.raises(UserError, match=r"TensorScatter .* is not directly a network (input|output)"):
        build(job(proto, tmp_path))


def test_cache_that_is_copied_is_a_warning(tmp_path):
    proto = build_graphs.decoder()
    update = next(node for node in proto.graph.node if node.output[0] == "present.0.value")
    past, new, _ = update.input
    update.CopyFrom(helper.make_node("Add", [past, new], ["present.0.value"]))
    (finding,) = build(job(proto, tmp_path, "^past"))["findings"]
    assert (finding.severity, finding.where) == ("warning", f"cache {past}")


def test_parser_that_dies_is_one_line(tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 4, 8, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    line = fails_with(build_graphs.model([helper.make_node("Attention", ["x", "x", "x"], ["y"])], [x], [y]), tmp_path)
    assert "SIGSEGV" in line
    assert "model.trt.onnx" in line


def test_parse_error_is_one_line(tmp_path):
    proto = build_graphs.decoder()
    made = next(node.output[0] for node in proto.graph.node if node.op_type == "Gemm")
    proto.graph.node.extend(helper.make_node("Det", [made], [f"det_{i}"], name=f"det_{i}") for i in range(2))
    line = fails_with(proto, tmp_path)
    assert "Det det_0" in line
    assert "(and 1 more)" in line


def test_build_error_is_one_line(tmp_path, monkeypatch):
    """The audit knows it beforehand; without the audit the builder says so."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 4, 8, 8]) for name in "qkvy"]
    proto = build_graphs.model([helper.make_node("Attention", ["q", "k", "v"], ["y"])], values[:3], values[3:])
    assert "no fused kernel for head_dim 8" in fails_with(proto, tmp_path)
    monkeypatch.setattr(worker, "audit", lambda *_: [])
    made = Job(
        saved(proto, tmp_path), tmp_path, tmp_path / "x.engine", "rtx", ("8.9",), None, (), frozenset(), tmp_path / "timings"
    )
    with pytest.raises(UserError, match="not supported by a dedicated kernel"):
        worker.build(made, lambda *_: None)


def test_dynamic_channels_of_a_picture():
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "c", "h", "w"]) for name in "xy")
    proto = build_graphs.model([helper.make_node("Relu", ["x"], ["y"])], [x], [y])
    with pytest.raises(UserError, match=r"input x: its dimension 1 \(c\), a picture's channels, is dynamic; give --shape x="):
        make_profiles(proto, None, split=True, batch=2, prompt=None, past=64)


def test_dynamic_dimension_that_no_decoder_has(tmp_path):
    proto = build_graphs.decoder()
    proto.graph.input.append(helper.make_tensor_value_info("adapter", TensorProto.FLOAT16, ["rank", 3]))
    with pytest.raises(UserError, match=r"input adapter: its dimension 0 \(rank\) is dynamic"):
        make_profiles(proto, find_signature(proto), split=True, batch=2, prompt=None, past=64)


def test_capability_that_the_flavour_cannot_build_for():
    with pytest.raises(UserError, match=r"9\.0: TensorRT-RTX does not build for it; choose among .*8\.9"):
        flavour.capabilities("rtx", ["8.9", "9.0"])


def test_prompt_longer_than_the_cache():
    proto = build_graphs.decoder()
    with pytest.raises(UserError, match="the cache has 64 slots"):
        make_profiles(proto, find_signature(proto), split=True, batch=1, prompt=65, past=64)


def test_no_space_left(tmp_path):
    proto = build_graphs.decoder()
    with pytest.raises(OSError, match="No space left"):
        build(replace(job(proto, tmp_path), engine=Path("/dev/full")))


@pytest.mark.slow
def test_interrupted_build_leaves_nothing(tmp_path):
    model = saved(build_graphs.decoder(layers=48), tmp_path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = started("-m", "suture.build", model, "--out", tmp_path / "out", start_new_session=True, **pipes)
    while "building" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert errors == "build: interrupted; run the same command again to carry on\n"
    assert not list((tmp_path / "out").glob("**/*"))
