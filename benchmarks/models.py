"""Every family at a tiny size through the stages, and the README's table of models made from the results.

    python -m benchmarks.models [--dtypes float32 float16 bfloat16] [--families NAME ...]     # runs, adds to docs/models.json
    python -m benchmarks.models --table                                                      # prints the table

A cell of the table is what a stage reported: nothing is yes that has not been run.
"""

import argparse
import contextlib
import io
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from models import architecture
from models.random_checkpoint import PRESETS, read_config
from tests.families import DECOMPOSED, FAMILIES, FUSED, counts, operated
from validate.__main__ import validate_pipeline

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "models.json"
CAPABILITIES = ("8.6", "8.9", "12.0")
TYPES = ("float32", "float16", "bfloat16")
# family -> what it covers, and a preset of its real dimensions
COVERS = {
    "llama": ("LLaMA, LLaMA-2-7B, Aquila-7B", "llama-2-7b"),
    "mistral": ("Mistral without a window", "mistral-7b"),
    "qwen2": ("Qwen1.5, Qwen2, Qwen2.5", "qwen2.5-7b"),
    "qwen3": ("Qwen3", "qwen3-8b"),
    "gpt2": ("gpt2-medium, camel-5b", "gpt2-medium"),
    "opt": ("Galactica", "galactica-6.7b"),
    "mpt": ("mpt-7B-65K", "mpt-7b-storywriter"),
    "gptbigcode": ("WizardCoder-15B", "wizardcoder-15b"),
    "decicoder": ("DeciCoder-1b", "decicoder-1b"),
    "whisper": ("Whisper (decoder; levels with made-up encoder caches)", "whisper-large-v2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--table", action="store_true", help="print the table from docs/models.json, run nothing")
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.table:
        print(table(results))
        return
    for name in options.families:
        for dtype in options.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                found = through(name, dtype, Path(folder))
            results.setdefault(name, {})[dtype] = found
            print(name, dtype, json.dumps(found), flush=True)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def through(name: str, dtype: str, folder: Path) -> dict:
    """What each stage reported of a family in one type."""
    with contextlib.redirect_stdout(io.StringIO()):
        out = operated(name, dtype, folder)
        command = [sys.executable, "-m", "build", out / "surgery" / "model.trt.onnx", "--out", out / "build"]
        built = subprocess.run([*command, "--compute-capability", *CAPABILITIES], cwd=ROOT, capture_output=True, text=True)
        validate_pipeline(out, argparse.Namespace(text=None, tolerance=None, seed=0, force=False))
    portable = onnx.load(out / "surgery" / "model.onnx")
    fused, report = counts(portable, FUSED), json.loads((out / "surgery" / "report.json").read_text())
    levels = json.loads((out / "validate" / "report.json").read_text())["levels"]
    return {
        "fused": fused,
        "all_fused": fused == FAMILIES[name].fused and not counts(portable, DECOMPOSED) and not report["unfused"],
        "levels": {str(level["number"]): level["status"] for level in levels[:3]},
        "engine": list(CAPABILITIES) if built.returncode == 0 else (built.stderr.strip().splitlines() or ["died"])[-1],
    }


def table(results: dict) -> str:
    lines = [
        "| family | covers | parameters | fused | onnxruntime match | network match | engine for |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (covers, preset) in COVERS.items():
        found = results.get(name, {})
        fused = next((row["fused"] for row in found.values() if row["all_fused"]), {})
        parts = ", ".join(f"{count} {op}" for op, count in fused.items()) or "not run"
        runtime, network = (
            _types(found, lambda row, n=n: all(row["levels"].get(i) == "passed" for i in n)) for n in ("12", "3")
        )
        built = _types(found, lambda row: isinstance(row["engine"], list))
        engine = f"{', '.join(CAPABILITIES)}: {built}" if built != "no" else "no"
        lines.append(f"| [{name}](tests/test_models.py) | {covers} | {parameters(preset)} ({preset}) | {parts} "
                     f"| {runtime} | {network} | {engine} |")  # fmt: skip
    return "\n".join(lines)


def parameters(preset: str) -> str:
    path = PRESETS / f"{preset}.json"
    model = architecture(read_config(path), path)
    return f"{sum(math.prod(tensor.shape) for tensor in model.state_dict().values()) / 1e9:.2f} B"


def _types(found: dict, holds) -> str:
    return ", ".join(dtype for dtype, row in found.items() if holds(row)) or "no"


if __name__ == "__main__":
    main()
