"""What it takes to quantise a model of 2 GB: seconds and peak memory of surgery in each format, as its manifest has them.

    python -m benchmarks.quantise_large [--formats FORMAT ...] [--layers 4] [--characters 3400] [--work DIR]

The model has layers of Qwen-7B's width and random weights, its vocabulary is cut so that layers are most of it, and the
text that formats are fitted to is short: time grows with it, memory does not.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks.processes import stage
from suture.core.command import CommandParser, run
from suture.core.manifest import read_manifest
from suture.models.named import PRESETS, checkpoint_folder, read_config
from suture.models.random_weights import write
from suture.surgery.quantize.calibration import DEFAULT
from suture.surgery.quantize.formats import FORMATS

VOCABULARY = 32768  # at least tiny-qwen's, whose tokenizer reads the text
CAPACITY = 512


def main() -> None:
    parser = CommandParser(prog="quantise_large", description="Time and memory that quantising a large model takes.")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT",
                        help=f"of {', '.join(FORMATS)}")  # fmt: skip
    parser.add_argument("--layers", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--config", metavar="FILE", type=Path, default=PRESETS / "qwen-7b.json", help="another width")
    parser.add_argument("--characters", type=int, default=3400, help="of text (%(default)s: about 1000 tokens)")
    parser.add_argument("--work", metavar="DIR", type=Path, help="keep the model here, and take one that is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(options, options.work or Path(scratch))


def measure(options: argparse.Namespace, work: Path) -> None:
    checkpoint, text = work / "checkpoint", work / "text.txt"
    if not (checkpoint / "config.json").exists():
        write(read_config(options.config, options.layers) | {"vocab_size": VOCABULARY}, checkpoint, "float16", seed=0)
        shutil.copy(checkpoint_folder("tiny-qwen") / "qwen.tiktoken", checkpoint)
    text.write_text(DEFAULT.read_text(encoding="utf-8")[: options.characters], encoding="utf-8")
    stage("export", "--checkpoint", checkpoint, "--dtype", "float16", "--weights", "reference", "--out", work / "export")
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    print(f"| {size / 1e9:.2f} GB of float16 | seconds | peak memory | quantised weights |")
    print("|---|---|---|---|")
    for name in options.formats:
        out = work / name
        shutil.rmtree(out, ignore_errors=True)
        arguments = ["--capacity", CAPACITY, "--quantize", name, *["--calibration", text] * FORMATS[name].calibrated]
        stage("surgery", work / "export" / "model.onnx", "--out", out, *arguments)
        manifest = read_manifest(out)
        stored = (out / "quantised.data").stat().st_size
        print(f"| {name} | {manifest['seconds']:.0f} | {manifest['peak_memory_bytes'] / 1e6:.0f} MB | {stored / 1e6:.0f} MB |",
              flush=True)  # fmt: skip
        shutil.rmtree(out)


if __name__ == "__main__":
    run("quantise_large", main)
