"""Every benchmark runs, at a size that costs little, and says what it should."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import foreign
from benchmarks.processes import measure
from suture.models.architectures import open_checkpoint
from suture.models.random_weights import write
from suture.runtime import io_binding as bound

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "kv_channels": 32,
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


def test_export_depth(config, tmp_path):
    arguments = ("--config", config, "--layers", 1, "--whole", "--out", tmp_path / "depth.json")
    printed = python("-m", "benchmarks.export_depth", *arguments, "--picture", tmp_path / "depth.svg")
    rows = json.loads((tmp_path / "depth.json").read_text())
    assert [(row["layers"], row["how"]) for row in rows] == [(1, "repeated")]
    assert rows[0]["cpu_s"] > 0
    assert rows[0]["nodes"] > 50
    assert "CPU" in printed
    assert (tmp_path / "depth.svg").read_text().startswith("<?xml")


def cells(printed: str, rule: str = "|") -> list[list[str]]:
    """The rows of printed tables, without headings' rules."""
    rows = [[cell.strip() for cell in line.strip(rule).split(rule)] for line in printed.splitlines() if line.startswith(rule)]
    return [row for row in rows if not set("".join(row)) <= {"-"}]


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


def test_engine_cost(graphs, tmp_path):
    printed = python("benchmarks/engine_cost.py", "--dir", graphs, "--work", tmp_path, "--picture", tmp_path / "bytes.svg")
    rows = {tuple(row[:3]): row[3:] for row in cells(printed, "│")}
    assert len(rows) == 6
    assert float(rows["lowered", "constants, two profiles", "decode"][-2]) < 1.1
    assert float(rows["exported", "constants, fixed shapes", "fixed"][-2]) > 1
    assert "<!-- floor -->" in (tmp_path / "bytes.svg").read_text()


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
