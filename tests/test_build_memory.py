"""What a build and an engine need of memory, estimated before, and refused where it cannot fit."""

import argparse
import sys

import build_graphs
import onnx
import pytest
from test_build import saved

import build.__main__ as build_main
from build.memory import estimate, refuse_what_cannot_fit
from build.profiles import make_profiles
from contracts.errors import UserError
from contracts.signature import find_signature


def memory(proto: onnx.ModelProto, **options):
    signature = find_signature(proto)
    return estimate(proto, signature, make_profiles(proto, signature, split=True, batch=4, prompt=64, past=64), **options)


def test_memory_of_qwen_7b_as_measured():
    """15.44 GB of weights, products merged: 18.3 GB of anonymous memory; as inputs: 0.6 GB. Apart: more than 20 GB."""
    proto = build_graphs.decoder(layers=32)
    merged = [node for node in proto.graph.node if node.op_type == "Gemm"]
    for index, node in enumerate(merged):
        node.input[0] = f"apart_{index}"
    assert memory(proto, constant=15_440_000_000, bound=0).builder_peak == pytest.approx(18.3e9, rel=0.03)
    assert memory(proto, constant=107_410, bound=15_440_000_000).builder_peak == pytest.approx(0.6e9, rel=0.03)
    for node, input_ in zip(
        merged, [node.input[0] for node in build_graphs.decoder(layers=32).graph.node if node.op_type == "Gemm"]
    ):
        node.input[0] = input_
    siblings = 32 * 2 * (3 * 128 * 128 + 2 * 128 * 256)
    apart = memory(proto, constant=15_440_000_000, bound=0)
    assert apart.builder_peak - 1.15 * 15_440_000_000 - siblings == pytest.approx(606e6, rel=0.01)


def test_memory_at_run_time():
    needed = memory(build_graphs.decoder(layers=2), constant=1_000_000, bound=500)
    assert needed.caches == 4 * 2 * 2 * 4 * 64 * 32 * 2
    assert needed.logits == 4 * 64 * 512 * 2
    assert needed.weights == 1_000_500
    # a layer's products, the mask, one layer's caches
    assert needed.activations == 256 * 2 * (5 * 128 + 2 * 256 + 64) + needed.caches // 2
    assert needed.gpu == needed.caches + needed.logits + needed.weights + needed.activations


def test_what_cannot_fit_is_refused_with_the_numbers(tmp_path, monkeypatch):
    needed = memory(build_graphs.decoder(), constant=15_440_000_000, bound=0)
    monkeypatch.setattr("build.memory.available_memory", lambda: 24_000_000_000)
    monkeypatch.setattr("build.memory.shutil.disk_usage", lambda folder: argparse.Namespace(free=16_000_000_000))
    refuse_what_cannot_fit(tmp_path / "m.onnx", tmp_path / "not" / "yet", needed, as_inputs=False)
    monkeypatch.setattr("build.memory.shutil.disk_usage", lambda folder: argparse.Namespace(free=9_000_000_000))
    with pytest.raises(UserError, match=r"the engine needs about 15.4 GB, and 9.0 GB are free"):
        refuse_what_cannot_fit(tmp_path / "m.onnx", tmp_path / "not" / "yet", needed, as_inputs=False)
    monkeypatch.setattr("build.memory.available_memory", lambda: 17_000_000_000)
    with pytest.raises(
        UserError, match=r"needs about 18.1 GB of memory, and 17.0 GB are free; free memory, or take --weights input"
    ):
        refuse_what_cannot_fit(tmp_path / "m.onnx", tmp_path, needed, as_inputs=False)


def test_a_build_that_cannot_fit_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr("build.memory.TENSORRT", 10**15)
    monkeypatch.setattr(sys, "argv", ["build", str(saved(build_graphs.decoder(), tmp_path)), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="building its engine needs about 1000000"):
        build_main.main(build_main._arguments())
    assert not (tmp_path / "out").exists()


def test_weights_that_an_engine_holds_twice():
    assert build_main.held_twice(3_302_000_000, 3_299_000_000, two=True) == []
    (finding,) = build_main.held_twice(6_000_000_000, 3_299_000_000, two=True)
    assert "2,701.0 MB more than its weights" in finding.what
    assert build_main.held_twice(6_000_000_000, 3_299_000_000, two=False) == []
