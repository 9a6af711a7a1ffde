"""What export costs as the model gets deeper: with alike layers traced once and repeated, and with all of them traced.

    python -m benchmarks.export_depth --preset qwen-7b --layers 4 8 16 32 --out depth.json [--picture depth.svg]

Each export is a process of its own on a checkpoint whose values are holes, so sizes are real and no disk is needed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from suture.core.command import CommandParser, run
from suture.core.errors import UserError
from suture.models.named import PRESETS

ROOT = Path(__file__).resolve().parents[1]
EXPORT = (
    "import suture.export.stage as stage, suture.export.trace as t; from suture.export.__main__ import main; "
    "stage.trace = lambda m, d: t.trace(m, d, whole={whole}); main()"
)


def main() -> None:
    parser = CommandParser(prog="export_depth", description="Time and memory of export over a model's depth.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", choices=sorted(path.stem for path in PRESETS.glob("*.json")))
    source.add_argument("--config", metavar="FILE", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32], help="(%(default)s)")
    parser.add_argument("--whole", type=int, nargs="*", default=[4, 8], help="depths to trace whole, too (%(default)s)")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="JSON")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="SVG or PNG")
    options = parser.parse_args()
    rows = []
    for layers in sorted({*options.layers, *options.whole}):
        for whole in (False, True):
            if layers in (options.whole if whole else options.layers):
                rows.append(measure(options, layers, whole))
                options.out.write_text(json.dumps(rows, indent=2) + "\n")
                print(
                    "{layers:4} layers {how:9} {wall_s:7.1f} s {cpu_s:7.1f} s CPU {peak_mb:6.0f} MB".format(**rows[-1]),
                    flush=True,
                )
    if options.picture:
        draw(rows, options.picture)


def measure(options: argparse.Namespace, layers: int, whole: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, out = Path(folder, "checkpoint"), Path(folder, "out")
        source = ["--preset", options.preset] if options.preset else ["--config", str(options.config)]
        size = ["--layers", str(layers), "--empty", "--out", str(checkpoint)]
        python(["-m", "suture.models.random_checkpoint", *source, *size])
        before = os.times()
        arguments = ["--checkpoint", str(checkpoint), "--weights", "reference", "--out", str(out)]
        python(["-c", EXPORT.format(whole=whole), *arguments])
        after = os.times()
        manifest = json.loads((out / "manifest.json").read_text())
        return {
            "layers": layers,
            "how": "whole" if whole else "repeated",
            "wall_s": round(after.elapsed - before.elapsed, 2),
            "cpu_s": round(sum(after[2:4]) - sum(before[2:4]), 2),
            "peak_mb": round(manifest["peak_memory_bytes"] / 1e6),
            "written_bytes": sum(manifest["outputs"].values()),
            "nodes": manifest["nodes"],
        }


def python(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(" ".join(arguments[:2]), f"failed ({done.stderr.strip()[-300:]})", "run it alone")


def draw(rows: list[dict], picture: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, key, unit in zip(axes, ("cpu_s", "peak_mb"), ("seconds of CPU", "peak memory, MB")):
        for how, style in (("repeated", "o-"), ("whole", "s--")):
            points = [(row["layers"], row[key]) for row in rows if row["how"] == how]
            axis.plot(*zip(*points), style, label=how) if points else None
        axis.set(xlabel="layers", ylabel=unit, ylim=(0, None))
    axes[0].legend(title="layers traced")
    figure.savefig(picture)


if __name__ == "__main__":
    run("export_depth", main)
