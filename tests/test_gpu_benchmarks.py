"""The benchmarks of the GPU run, on the CPU at a size that costs little, and say what they should."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_runs import ROOT, cells, python, tiny_config

from suture.models.architectures import open_checkpoint
from suture.runtime import io_binding as bound

pytestmark = pytest.mark.benchmarks


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return tiny_config(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def graphs(tiny_export, tmp_path_factory) -> Path:
    """A folder with checkpoint/, tiny-qwen in float32, and the stages' graphs of it."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "checkpoint").mkdir()
    shutil.copy(ROOT / "models" / "tiny-qwen" / "config.json", folder / "checkpoint")
    shutil.copy(tiny_export / "model.safetensors", folder / "checkpoint")
    (folder / "export").symlink_to(tiny_export)
    python("-m", "suture.surgery", tiny_export / "model.onnx", "--capacity", 32, "--onnxruntime", "--out", folder / "surgery")
    return folder


def decode(graphs: Path, checkpoint: Path, *more: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "benchmarks.gpu_decode", "--device", "cpu", "--checkpoint", str(checkpoint)]
    line += ["--graphs", str(graphs), "--common", "decode 1x6", "--cells", "decode 2x8", "prompt 5", "--repeats", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line += map(str, more)
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def decoded(graphs) -> Path:
    """What gpu_decode measured of five runs."""
    runs = ["surgered-cuda-graph", "surgered-onnxruntime-cuda-graph", "surgered", "exported", "eager"]
    out = graphs / "results.json"
    done = decode(graphs, graphs / "checkpoint", "--runs", *runs, "--kernels", "eager", "--out", out, "--strict")
    assert done.returncode == 0, done.stderr
    return out


def test_gpu_decode(decoded):
    runs = ["surgered-cuda-graph", "surgered-onnxruntime-cuda-graph", "surgered", "exported", "eager"]
    results = json.loads(decoded.read_text())
    assert [result["run"] for result in results["results"]] == [run for run in runs for _ in range(3)]
    assert {result["cell"] for result in results["results"]} == {"decode 1x6", "decode 2x8", "prompt 5"}
    for result in results["results"]:
        assert result["ms"] > 0
        assert result["percent_of_limit"] > 0
        assert result["error"] <= 1e-5
    assert all(limit > 0 for name, limit in results["limits"].items() if name != "device")
    assert sum(kernel["us"] for kernel in results["kernels"]) > 0


def test_gpu_decode_of_compiled_torch(config, tmp_path):
    """Compiled for the CPU: the caches, the marks of steps and the comparison are those of the GPU."""
    python("-m", "suture.models.random_checkpoint", "--config", config, "--dtype", "float32", "--out", tmp_path / "checkpoint")
    line = ["-m", "benchmarks.gpu_decode", "--device", "cpu", "--checkpoint", tmp_path / "checkpoint", "--graphs", tmp_path]
    line += ["--common", "decode 1x6", "--cells", "decode 1x6", "--repeats", 2, "--out", tmp_path / "results.json"]
    python(*line, "--runs", "compiled-reduce-overhead")
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (result["run"], result["cell"]) == ("compiled-reduce-overhead", "decode 1x6")
    assert result["ms"] > 0
    assert result["error"] < 1e-5


def test_gpu_decode_of_last_logits(graphs):
    python("-m", "suture.surgery", graphs / "export" / "model.onnx", "--capacity", 32, "--onnxruntime", "--logits", "last",
           "--out", graphs / "last" / "surgery")  # fmt: skip
    (graphs / "last" / "export").symlink_to(graphs / "export")
    out, runs = graphs / "last.json", ["surgered-onnxruntime-cuda-graph", "exported", "eager"]
    arguments = ["--runs", *runs, "--logits", "last", "--out", out, "--strict"]
    done = decode(graphs / "last", graphs / "checkpoint", *arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert [result["run"] for result in results] == [run for run in runs for _ in range(3)]
    assert all(result["error"] <= 1e-5 for result in results)


def test_gpu_tables(decoded, tmp_path):
    printed = python("-m", "benchmarks.gpu_tables", decoded, "--picture", tmp_path / "kernels.svg")
    measured = json.loads(decoded.read_text())
    rows = [line.split(" | ") for line in printed.splitlines() if "| decode" in line or "| prompt" in line]
    assert [row[1:3] for row in rows] == [[result["cell"], f"{result['ms']:.2f}"] for result in measured["results"]]
    assert rows[0][0] == "| portable graph, CUDA graph"
    assert f"**{sum(kernel['us'] for kernel in measured['kernels']):,.0f}**" in printed
    assert "<!-- matrix products -->" in (tmp_path / "kernels.svg").read_text()


def test_gpu_decode_of_quantised_weights(graphs):
    for name in ("int8", "int4"):
        python(
            "-m",
            "suture.surgery",
            graphs / "export" / "model.onnx",
            "--capacity",
            32,
            "--out",
            graphs / name,
            "--quantize",
            name,
        )
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


@pytest.fixture(scope="module")
def steps(config, tmp_path_factory) -> list[object]:
    """The arguments of gpu_steps, whose stages' files lie in a folder of its own."""
    size = ["--config", config, "--dtype", "float32", "--layers", 2, "--chunk", 8, "--tokens", 10, "--device", "cpu"]
    return [*size, "--work", tmp_path_factory.mktemp("steps")]


def test_gpu_steps(steps):
    from benchmarks import gpu_steps  # only here: it imports transformers' models, which no other test needs

    lines = python("-m", "benchmarks.gpu_steps", *steps).splitlines()
    judged = [line.split(": ")[0] for line in lines if line.startswith(("right", "WRONG"))]
    sequence = len(gpu_steps.script(8)) + 1
    assert judged == ["right  two sessions"] * sequence + ["right  one session"] * sequence + ["right  generate"] * 8
    assert "decoding steps in" in lines[-1]


def test_gpu_steps_finds_a_step_that_reads_what_an_earlier_one_was_given(steps, monkeypatch, capsys):
    """The places to write to stay those of the first step of its kind."""
    from benchmarks import gpu_steps

    given = bound.BoundStep.run

    def stale(step: bound.BoundStep, feeds: dict) -> torch.Tensor:
        step.places = getattr(step, "places", feeds["write_indices"])
        return given(step, feeds | {"write_indices": step.places})

    monkeypatch.setattr(bound.BoundStep, "run", stale)
    assert gpu_steps.main([str(argument) for argument in steps]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("WRONG  one session: second chunk") for line in lines)
    assert any(line.startswith("WRONG  generate") for line in lines)
    assert "decoding steps in" not in lines[-1]  # nothing wrong is timed


def test_engine_cost(graphs, tmp_path):
    printed = python("benchmarks/engine_cost.py", "--dir", graphs, "--work", tmp_path, "--picture", tmp_path / "bytes.svg")
    rows = {tuple(row[:3]): row[3:] for row in cells(printed, "│")}
    assert len(rows) == 6
    assert float(rows["lowered", "constants, two profiles", "decode"][-2]) < 1.1
    assert float(rows["exported", "constants, fixed shapes", "fixed"][-2]) > 1
    assert "<!-- floor -->" in (tmp_path / "bytes.svg").read_text()
