"""What tests of benchmarks share."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def tiny_config(folder: Path) -> Path:
    """An original Qwen's config.json, of one small layer."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads((ROOT / "models" / "presets" / "qwen-7b.json").read_text()) | TINY))
    return path


def cells(printed: str, rule: str = "|") -> list[list[str]]:
    """The rows of printed tables, without headings' rules."""
    rows = [[cell.strip() for cell in line.strip(rule).split(rule)] for line in printed.splitlines() if line.startswith(rule)]
    return [row for row in rows if not set("".join(row)) <= {"-"}]
