"""Every benchmark of export and decoding runs, at a size that costs nothing, and says what it should."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models import open_checkpoint
from models.random_checkpoint import write

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "seq_length": 64,
}


def python(*arguments: object) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("benchmarks") / "config.json"
    path.write_text(json.dumps(json.loads((ROOT / "models" / "presets" / "qwen-7b.json").read_text()) | TINY))
    return path


@pytest.fixture(scope="module")
def graphs(tiny_export, tmp_path_factory) -> Path:
    """A folder with checkpoint/, tiny-qwen in float32, and the stages' graphs of it."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "checkpoint").mkdir()
    shutil.copy(ROOT / "models" / "tiny-qwen" / "config.json", folder / "checkpoint")
    shutil.copy(tiny_export / "model.safetensors", folder / "checkpoint")
    (folder / "export").symlink_to(tiny_export)
    python("-m", "surgery", tiny_export / "model.onnx", "--capacity", 32, "--out", folder / "surgery")
    return folder


def decode(graphs: Path, checkpoint: Path, *more: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "benchmarks.gpu_decode", "--device", "cpu", "--checkpoint", str(checkpoint)]
    line += ["--graphs", str(graphs), "--common", "decode 1x6", "--cells", "decode 2x8", "prompt 5", "--repeats", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line += map(str, more)
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def test_gpu_decode(graphs):
    runs = ["surgered-cuda-graph", "surgered", "exported", "eager"]
    out = graphs / "results.json"
    done = decode(graphs, graphs / "checkpoint", "--runs", *runs, "--kernels", "eager", "--out", out, "--strict")
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert [result["run"] for result in results["results"]] == [run for run in runs for _ in range(3)]
    assert {result["cell"] for result in results["results"]} == {"decode 1x6", "decode 2x8", "prompt 5"}
    for result in results["results"]:
        assert result["ms"] > 0
        assert result["percent_of_limit"] > 0
        assert result["error"] <= 1e-5
    assert all(limit > 0 for name, limit in results["limits"].items() if name != "device")
    assert sum(kernel["us"] for kernel in results["kernels"]) > 0


def test_gpu_decode_of_quantised_weights(graphs):
    for name in ("int8", "int4"):
        python("-m", "surgery", graphs / "export" / "model.onnx", "--capacity", 32, "--out", graphs / name, "--quantize", name)
    out, runs = graphs / "quantised.json", ["surgered", "int8-cuda-graph", "int4-cuda-graph"]
    done = decode(graphs, graphs / "checkpoint", "--runs", *runs, "--out", out)
    assert done.returncode == 0, done.stderr
    float32, int8, int4 = (json.loads(out.read_text())["results"][index] for index in (0, 3, 6))
    assert float32["error"] < 1e-5 < int8["error"] < int4["error"]
    moved = [result["gb_per_s"] * result["ms"] for result in (float32, int8, int4)]
    assert moved[0] > 3 * moved[1] > 3 * moved[2]


def test_gpu_decode_times_nothing_that_is_wrong(graphs, tmp_path):
    """The graphs' weights are not the checkpoint's: the difference is found before the clock starts."""
    shutil.copytree(graphs / "checkpoint", tmp_path / "other")
    entry = open_checkpoint(tmp_path / "other").tensors["transformer.h.2.mlp.w2.weight"]
    with open(entry.file, "r+b") as file:
        file.seek(entry.offset)
        file.write(bytes(entry.length))
    out = tmp_path / "results.json"
    done = decode(graphs, tmp_path / "other", "--own-weights", "--runs", "surgered", "--out", out)
    assert done.returncode == 1
    assert all(r["ms"] is None and r["note"].startswith("wrong") for r in json.loads(out.read_text())["results"])


def test_export_depth(config, tmp_path):
    arguments = ("--config", config, "--layers", 1, "--whole", "--out", tmp_path / "depth.json")
    printed = python("-m", "benchmarks.export_depth", *arguments, "--picture", tmp_path / "depth.svg")
    rows = json.loads((tmp_path / "depth.json").read_text())
    assert [(row["layers"], row["how"]) for row in rows] == [(1, "repeated")]
    assert rows[0]["cpu_s"] > 0
    assert rows[0]["nodes"] > 50
    assert "CPU" in printed
    assert (tmp_path / "depth.svg").read_text().startswith("<?xml")


def test_random_checkpoint_is_remade_from_its_seed(config, tmp_path):
    arguments = ["-m", "models.random_checkpoint", "--config", config, "--dtype", "float32", "--layers", 2]
    python(*arguments, "--out", tmp_path / "one")
    write(json.loads(config.read_text()) | {"num_hidden_layers": 2}, tmp_path / "two", "float32", seed=0, shard_bytes=10_000)
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "two")
    assert len({entry.file for entry in two.tensors.values()}) > 1
    assert one.tensors.keys() == two.tensors.keys()
    assert all((one.load(name) == two.load(name)).all() for name in one.tensors)
    weight = one.load("transformer.h.1.mlp.w1.weight")
    assert abs(weight.std() * weight.shape[1] ** 0.5 - 1) < 0.1
    assert not (weight == one.load("transformer.h.1.mlp.w2.weight")).any()


def test_random_checkpoint_has_the_published_layout(tmp_path):
    """The 8 shards of Qwen-7B, where the index of the real one is at hand; its headers only."""
    index = ROOT.parent / "shared" / "qwen-7b" / "model.safetensors.index.json"
    if not index.exists():
        pytest.skip("the published index is not here")
    python("-m", "models.random_checkpoint", "--preset", "qwen-7b", "--empty", "--out", tmp_path)
    published = json.loads(index.read_text())
    ours = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert ours["weight_map"] == published["weight_map"]
    assert ours["metadata"]["total_size"] == published["metadata"]["total_size"] == 15_442_649_088
    assert sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512 < 1_000_000  # holes
    assert {entry.dtype for entry in open_checkpoint(tmp_path).tensors.values()} == {"bfloat16"}
