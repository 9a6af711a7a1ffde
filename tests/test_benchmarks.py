"""Every other benchmark runs, at a size that costs little, and says what it should."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_runs import ROOT, cells, python, tiny_config

from benchmarks import foreign
from benchmarks.processes import measure
from suture.models.architectures import open_checkpoint
from suture.models.random_weights import write

pytestmark = pytest.mark.benchmarks


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return tiny_config(tmp_path_factory.mktemp("benchmarks"))


def test_export_depth(config, tmp_path):
    arguments = ("--config", config, "--layers", 1, "--whole", "--out", tmp_path / "depth.json")
    printed = python("-m", "benchmarks.export_depth", *arguments, "--picture", tmp_path / "depth.svg")
    rows = json.loads((tmp_path / "depth.json").read_text())
    assert [(row["layers"], row["how"]) for row in rows] == [(1, "repeated")]
    assert rows[0]["cpu_s"] > 0
    assert rows[0]["nodes"] > 50
    assert "CPU" in printed
    assert (tmp_path / "depth.svg").read_text().startswith("<?xml")


def test_surgery(tiny_export, tmp_path):
    """Beside the graph tools that are installed; then over nodes."""
    printed = python("-m", "benchmarks.surgery", "--model", tiny_export / "model.onnx", "--work", tmp_path)
    rows = {row[0]: row[1:] for row in cells(printed, "│")}
    ours, eager = rows["Suture surgery"], rows["graph-surgeon, eager"]
    assert ours[3:] == ["1.0", "1.0", ""]
    assert float(ours[2].removesuffix(" GB")) < 0.5
    assert eager[-1] == ""
    assert float(eager[3]) == pytest.approx(float(eager[0]) / float(ours[0]), abs=0.1)
    shutil.copytree(tiny_export, tmp_path / "tiny")
    curve = cells(python("-m", "benchmarks.surgery", "--curve", "--most", 1000, "--work", tmp_path), "│")
    assert len(curve) == 1
    assert 900 < int(curve[0][0].replace(",", "")) <= 1000
    assert 0 < float(curve[0][3]) < 50  # ms a node


def test_peers(tmp_path):
    """The driver; the peers themselves are there where they were installed."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = json.loads((ROOT / "models" / "presets" / "qwen2.5-0.5b.json").read_text()) | shape
    (tmp_path / "small.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "vocab_size": 160}))
    line = [
        "--config",
        tmp_path / "small.json",
        "--optimum",
        sys.executable,
        "--work",
        tmp_path,
        "--out",
        tmp_path / "rows.json",
    ]
    printed = python("-m", "benchmarks.peers", *line)
    rows = {row["tool"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    ours, export, surgery = (rows.pop(tool) for tool in ("Suture", "export", "surgery"))
    assert (ours["failure"], ours["peak"]) == (None, max(export["peak"], surgery["peak"]))
    assert ours["seconds"] == pytest.approx(export["seconds"] + surgery["seconds"])
    assert 10_000 < export["written"] < ours["checkpoint_bytes"]  # weights by reference
    assert rows.keys() == {"Optimum", "onnxruntime-genai"}
    assert all(row["failure"] is None or "No module named" in row["failure"] for row in rows.values())
    assert cells(printed, "│")[0][:2] == ["small, 0.00 GB", "Suture"]


@pytest.mark.parametrize(
    ("code", "allowed", "failure"),
    [
        ("held = b'x' * 300_000_000; import time; time.sleep(60)", {"most_memory": 10**8}, "stopped: beyond 0.1 GB"),
        ("import time; time.sleep(60)", {"most_seconds": 0.2}, "stopped: beyond 0 s"),
        ("import sys; sys.exit('one\\ntwo')", {}, "two"),
        ("held = b'x' * 200_000_000", {"most_memory": 10**9}, None),
    ],
)
def test_a_process_is_measured_and_stopped(code, allowed, failure):
    done = measure([sys.executable, "-c", code], **allowed)
    assert done.failure == failure
    assert 0 < done.seconds < 30
    assert done.peak > (2e8 if "200" in code else 1e6)


def test_build_modes(config, tmp_path):
    line = ["--config", config, "--work", tmp_path, "--modes", "weights as inputs", "--capacities", 64]
    modes, sizes = cells(python("benchmarks/build_modes.py", *line))[1::2]
    engine = json.loads((tmp_path / "engine-0" / "engine.json").read_text())
    assert (modes[0], modes[4]) == ("weights as inputs", f"{engine['engine_bytes'] / 1e6:,.1f} MB")
    assert 1 <= float(modes[-1]) < 1.1
    weights, cache, rest, whole = (float(size.removesuffix(" MB")) for size in sizes[1:])
    assert whole == pytest.approx(weights + cache + rest, abs=0.2)
    assert weights > cache > 0


def test_families():
    (row,) = cells(python("-m", "benchmarks.families", "llama-dynamo-24-float16"))[1:]
    assert row[1:4] == ["191 → 70", "2 Attention, 5 RMSNormalization, 4 RotaryEmbedding, 2 Swish, 4 TensorScatter", "nothing"]
    assert 0 < float(row[5]) < 1e-2
    assert 0 < float(row[7]) < 1e-2
    assert row[9] == "built"


def test_quantisation(tmp_path):
    out, picture = tmp_path / "table.json", tmp_path / "table.svg"
    size = ["--rows", "int8", "--windows", 1, "--new-tokens", 4]
    printed = python("-m", "benchmarks.quantisation", *size, "--out", out, "--plot", picture)
    (row,) = json.loads(out.read_text())
    assert 0 < row["mean_kl"] < row["kl_99"] < 1e-2
    assert abs(row["change"]) < 0.02
    assert cells(printed)[1][2] == f"{row['perplexity']:.4f}"
    assert "<!-- int8" in picture.read_text()


def test_quantisers():
    """Others' than this project's and onnxruntime's need an environment of their own."""
    rows = cells(python("-m", "benchmarks.quantisers", "--windows", 1))[1:]
    assert [row[0] for row in rows] == ["onnxruntime, to the nearest", "ours, to the nearest", "ours, awq"]
    divergences = [float(row[4]) for row in rows]
    assert divergences[2] < divergences[1] < 0.2
    assert all(row[6] == "takes it" for row in rows)


def test_quantise_large(config, tmp_path):
    arguments = ["--config", config, "--layers", 1, "--characters", 1500, "--formats", "int8"]
    (row,) = cells(python("-m", "benchmarks.quantise_large", *arguments, "--work", tmp_path))[1:]
    assert row[0] == "int8"
    assert 0 < float(row[2].removesuffix(" MB")) < 2000


def test_random_checkpoint_is_remade_from_its_seed(config, tmp_path):
    arguments = ["-m", "suture.models.random_checkpoint", "--config", config, "--dtype", "float32", "--layers", 2]
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
    python("-m", "suture.models.random_checkpoint", "--preset", "qwen-7b", "--empty", "--out", tmp_path)
    published = json.loads(index.read_text())
    ours = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert ours["weight_map"] == published["weight_map"]
    assert ours["metadata"]["total_size"] == published["metadata"]["total_size"] == 15_442_649_088
    assert sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512 < 1_000_000  # holes
    assert {entry.dtype for entry in open_checkpoint(tmp_path).tensors.values()} == {"bfloat16"}


def test_foreign(tmp_path):
    """Of two graphs that fuse, and a file that is no graph."""
    cases = ROOT / "tests" / "graphs" / "cases"
    (tmp_path / "none.onnx").write_bytes(b"none")
    line = python("-m", "benchmarks.foreign", cases / "one_token_llama31.onnx", cases / "softcap.onnx", tmp_path).splitlines()[
        -1
    ]
    assert line == "3 files that others wrote: 2 fused, 1 refused in one line, 0 tracebacks, 0 silent differences"


def test_foreign_sees_a_silent_difference(monkeypatch, capsys):
    def changed(source):
        operated = operate(source, no_verify=True)
        scale = next(each for node in operated.portable.graph.node for each in node.attribute if each.name == "scale")
        scale.f *= 1.01
        return operated

    operate = foreign.suture.operate
    monkeypatch.setattr(foreign.suture, "operate", changed)
    monkeypatch.setattr("sys.argv", ["foreign", str(ROOT / "tests" / "graphs" / "cases" / "one_token_llama31.onnx")])
    assert foreign.main() == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 tracebacks, 1 silent differences")


def test_cuda_kernels_needs_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.cuda_kernels"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "Needs a GPU and onnxruntime-gpu" in shown.stdout
    table = ROOT / "core" / "cuda_kernels.json"
    before = table.read_bytes()
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=without)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no GPU here, and the table is made on one" in line
    assert table.read_bytes() == before
