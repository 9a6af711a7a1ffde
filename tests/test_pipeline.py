"""pipeline.py as a user runs it: all stages on a small random checkpoint, again when up to date, and when things go wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.qwen import build

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "intermediate_size": 384,
    "seq_length": 16,
    "max_position_embeddings": 64,
    "layer_norm_epsilon": 1e-6,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    save_file(dict(build(CONFIG, "config").state_dict()), folder / "model.safetensors")
    return folder


def pipeline(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "pipeline.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


def test_all_stages_run_then_are_up_to_date(checkpoint, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "--checkpoint",
        checkpoint,
        "--out",
        out,
        "--capacity",
        64,
        "--compute-capability",
        "8.9",
        "--dtype",
        "float16",
    ]
    first = pipeline(*arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    table = first.stdout[first.stdout.rindex("peak memory") :]
    for stage in ("export", "surgery", "build", "validate"):
        assert re.search(rf"│ {stage} +│ +[\d.]+ │ +[\d,]+ MB │", table), table
        assert (out / stage / "manifest.json").is_file()
        assert not (out / stage / ".partial").exists()
    assert json.loads((out / "validate" / "report.json").read_text())["verdict"] == "passed"
    assert (out / "build" / "model.engine").stat().st_size > 0

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = pipeline(*arguments)
    assert second.returncode == 0
    assert second.stdout.count("up to date") == 4
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == written


def test_a_killed_stage_leaves_nothing_and_the_next_run_carries_on(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "pipeline.py", "--checkpoint", checkpoint, "--out", out, "--capacity", "64"]
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "export" / ".partial").exists():
        assert time.monotonic() < deadline, "export did not start to write"
        time.sleep(0.02)
    child = int(Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()[0])
    os.kill(child, signal.SIGKILL)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 2
    assert errors.strip().splitlines() == ["pipeline: export was killed by SIGKILL; run the same command to carry on"]
    assert [path.name for path in (out / "export").iterdir()] == [".partial"]

    again = subprocess.run(
        [sys.executable, "-m", "export", "--checkpoint", checkpoint, "--out", out / "export"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert {"model.onnx", "manifest.json"} <= {path.name for path in (out / "export").iterdir()}
    assert not (out / "export" / ".partial").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "nowhere"], "nowhere: no such folder"),
        (["--model", "no-such-model"], "--model no-such-model"),
        (["--model", "tiny-qwen", "--dtype", "float8"], "--dtype"),
    ],
)
def test_unusable_arguments_get_one_line_and_status_2(arguments, said, tmp_path):
    done = pipeline(*arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert said in lines[0]


def test_help_and_wrong_arguments_wait_for_no_library():
    """What each stage computes with is imported by the stage's own process."""
    asked = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_path('pipeline.py', run_name='__main__')\n"
    asked += "except SystemExit: print({'torch', 'onnx_graphsurgeon', 'onnxruntime', 'matplotlib', 'tensorrt_rtx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True)
    assert "--compute-capability" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
