"""What a build and an engine need of memory, estimated before, and refused where it cannot fit."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import build_graphs
import numpy as np
import onnx
import pytest
from test_build import saved

from suture.build import __main__ as build_main
from suture.build.memory import estimate, refuse_what_cannot_fit
from suture.build.profiles import make_profiles
from suture.build.stage import held_twice
from suture.core.errors import UserError
from suture.core.signature import find_signature
from suture.surgery.__main__ import main as surgery_main

ROOT = Path(__file__).parents[1]


def memory(proto: onnx.ModelProto, **options):
    signature = find_signature(proto)
    return estimate(proto, signature, make_profiles(proto, signature, split=True, batch=4, prompt=64, past=64), **options)


def test_memory_of_qwen_7b_as_measured():
    """15.44 GB of weights: gate and up apart 21.6 GB, as one 16.0 (from two, four and six layers); as inputs 0.6 GB."""
    proto = build_graphs.decoder(layers=32)
    products = [node for node in proto.graph.node if node.op_type == "Gemm"]
    shared = [node.input[0] for node in products]
    for index, node in enumerate(products):
        node.input[0] = f"apart_{index}"
    assert memory(proto, constant=15_440_000_000, bound=0).builder_peak == pytest.approx(16.0e9, rel=0.01)
    assert memory(proto, constant=107_410, bound=15_440_000_000).builder_peak == pytest.approx(0.6e9, rel=0.03)
    for node, name in zip(products, shared):
        node.input[0] = name
    siblings = 32 * 2 * (3 * 128 * 128 + 2 * 128 * 256)
    apart = memory(proto, constant=15_440_000_000, bound=0)
    assert apart.builder_peak - 15_440_000_000 - siblings == pytest.approx(606e6, rel=0.01)


def test_weights_of_4_bits_are_packed_anew():
    proto = build_graphs.decoder()
    proto.graph.initializer.append(onnx.TensorProto(name="packed", data_type=onnx.TensorProto.INT4, dims=[512, 128]))
    before, after = (memory(graph, constant=10**6, bound=0).builder_peak for graph in (build_graphs.decoder(), proto))
    assert after - before == 512 * 128 / 2


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
    monkeypatch.setattr("suture.build.memory.available_memory", lambda: 24_000_000_000)
    monkeypatch.setattr("suture.build.memory.shutil.disk_usage", lambda folder: argparse.Namespace(free=16_000_000_000))
    refuse_what_cannot_fit(tmp_path / "m.onnx", tmp_path / "not" / "yet", needed, as_inputs=False)
    monkeypatch.setattr("suture.build.memory.shutil.disk_usage", lambda folder: argparse.Namespace(free=9_000_000_000))
    with pytest.raises(UserError, match=r"the engine needs about 15.4 GB, and 9.0 GB are free"):
        refuse_what_cannot_fit(tmp_path / "m.onnx", tmp_path / "not" / "yet", needed, as_inputs=False)
    monkeypatch.setattr("suture.build.memory.available_memory", lambda: 15_000_000_000)
    with pytest.raises(
        UserError, match=r"needs about 15.8 GB of memory, and 15.0 GB are free; free memory, or take --weights input"
    ):
        refuse_what_cannot_fit(tmp_path / "m.onnx", tmp_path, needed, as_inputs=False)


def test_a_build_that_cannot_fit_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr("suture.build.memory.TENSORRT", 10**15)
    monkeypatch.setattr(sys, "argv", ["build", str(saved(build_graphs.decoder(), tmp_path)), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="building its engine needs about 1000000"):
        build_main.main()
    assert not (tmp_path / "out").exists()


def test_weights_that_an_engine_holds_twice():
    assert held_twice(3_302_000_000, 3_299_000_000, two=True) == []
    (finding,) = held_twice(6_000_000_000, 3_299_000_000, two=True)
    assert "2,701.0 MB more than its weights" in finding.what
    assert held_twice(6_000_000_000, 3_299_000_000, two=False) == []


def gated_layers(folder: Path, layers: int = 4, hidden: int = 1024, features: int = 16384) -> Path:
    """Gated MLPs in float16 over one `down`, each gate followed by its up in one file, as checkpoints have them."""
    nodes, weights, x = "", ["down"], "x"
    for n in range(layers):
        nodes += f"a{n} = Gemm<transB = 1>({x}, gate{n})  s{n} = Swish(a{n})  b{n} = Gemm<transB = 1>({x}, up{n})  "
        nodes += f"m{n} = Mul(s{n}, b{n})  d{n} = Gemm<transB = 1>(m{n}, down)  y{n} = Add({x}, d{n})  "
        weights, x = [*weights, f"gate{n}", f"up{n}"], f"y{n}"
    shapes = f"(float16[batch, {hidden}] x) => (float16[batch, {hidden}] y{layers - 1})"
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 24]> gated {shapes} {{ {nodes} }}')
    random, length = np.random.default_rng(0), 2 * hidden * features
    with open(folder / "model.bin", "wb") as file:
        for index, name in enumerate(weights):
            random.integers(0x1000, 0x1400, length // 2, np.uint16).tofile(file)  # 2**-11 to 2**-10
            tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT16, data_location=onnx.TensorProto.EXTERNAL)
            tensor.dims.extend([hidden, features] if name == "down" else [features, hidden])
            for key, value in (("location", "model.bin"), ("offset", length * index), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            model.graph.initializer.append(tensor)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.slow
@pytest.mark.parametrize("skipped", [[], ["neighbouring_weights"], ["split_products"]], ids=["lowered", "apart", "split"])
def test_weights_are_held_once(skipped, tmp_path):
    """TensorRT joins gate and up itself where surgery does not, and cuts them where they are split along their last axis."""
    skip = [word for name in skipped for word in ("--skip", name)]
    assert surgery_main([str(gated_layers(tmp_path)), "--out", str(tmp_path / "surgery"), *skip]) == 0
    command = [sys.executable, "-m", "suture.build", tmp_path / "surgery" / "model.trt.onnx", "--out", tmp_path / "build"]
    subprocess.run([*command, "--compute-capability", "8.9"], cwd=ROOT, check=True, capture_output=True)
    engine = json.loads((tmp_path / "build" / "engine.json").read_text())
    weights = 9 * 2 * 1024 * 16384
    assert engine["engine_bytes"] == pytest.approx(weights, rel=0.02)
    assert engine["profiles"][0]["kernels"] == 4 * 3  # gate and up; SiLU and product; down and sum
    assert (engine["peak_anonymous_bytes"] < weights + 320_000_000) == (not skipped)
