"""Checkpoint to fused graph, and what the same costs with other exporters: each a process of its own, on the same files.

    pip install -r requirements-bench.txt
    python -m venv OPTIMUM && OPTIMUM/bin/pip install -r requirements-optimum.txt    # it needs an older transformers
    python -m benchmarks.peers --optimum OPTIMUM/bin/python [--models qwen2.5-0.5b qwen2.5-7b:2] [--memory 14]

Checkpoints are random, in float16, in the layout of the real ones; MODEL:N has N layers. All write float16 graphs with
caches as inputs and outputs. Optimum's is decomposed, with a growing cache (its check of the result is left out);
onnxruntime-genai's has onnxruntime's contrib operators; Suture's export and surgery end in fused standard ops and a static cache.
Qwen-7B's original architecture is not among the models: Optimum would have to run code from the checkpoint.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.processes import Run, empty, gigabytes, measure
from suture.core.command import CommandParser, run
from suture.core.errors import UserError

MODELS = ("qwen2.5-0.5b", "qwen2.5-7b:2")
DTYPE = "float16"
# the peers look for a tokenizer beside the weights
TOKENIZER = (
    "import sys, tokenizers, transformers\n"
    "words = {'<unk>': 0} | {str(i): i for i in range(1, 100)}\n"
    "tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<unk>'))\n"
    "fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token='<unk>')\n"
    "fast.save_pretrained(sys.argv[1])"
)
OPTIMUM = (
    "import sys; from optimum.exporters.onnx import main_export\n"
    "main_export(sys.argv[1], sys.argv[2], task='text-generation-with-past', dtype='fp16', do_validation=False)"
)


@dataclass
class ExporterRun:
    """One tool on one checkpoint; `written`: bytes in its folder, also where it was stopped."""

    model: str
    checkpoint_bytes: int
    tool: str
    seconds: float
    cpu_seconds: float
    peak: int
    written: int
    failure: str | None


def main() -> None:
    parser = CommandParser(prog="peers", description="Time, memory and disk of exporters on the same checkpoint.")
    parser.add_argument("--optimum", metavar="PYTHON", type=Path, help="of the environment with requirements-optimum.txt")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--models", nargs="+", metavar="MODEL[:LAYERS]", default=MODELS, help=f"({' '.join(MODELS)})")
    source.add_argument("--config", metavar="FILE", type=Path, help="another model's config.json")
    parser.add_argument("--empty", action="store_true", help="checkpoints of holes instead of values, which take no room")
    parser.add_argument("--memory", type=float, metavar="GB", help="stop a tool beyond it (mapped files do not count)")
    parser.add_argument("--seconds", type=float, default=1800, help="stop a tool after it (%(default)s)")
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path("out/benchmarks/peers"), help="(%(default)s)")
    parser.add_argument("--out", metavar="FILE.json", type=Path)
    options = parser.parse_args()
    if options.optimum and not options.optimum.is_file():
        raise UserError(str(options.optimum), "no such file", "name the Python of Optimum's environment")
    found = []
    for model in [str(options.config)] if options.config else options.models:
        found += compare(model, options)
        if options.out:
            options.out.write_text(json.dumps([asdict(each) for each in found], indent=2) + "\n")
    Console(width=128).print(table(found))


def compare(model: str, options: argparse.Namespace) -> list[ExporterRun]:
    work = options.work.resolve() / named(model).replace(":", "-")
    checkpoint = write_checkpoint(model, work, options.empty)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))

    def measured(tool: str, command: list[object], out: Path) -> ExporterRun:
        most = int(options.memory * 1e9) if options.memory else None
        found = measure([str(each) for each in command], most, options.seconds)
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        row = ExporterRun(model, size, tool, found.seconds, found.cpu_seconds, found.peak, written, found.failure)
        print(f"{tool}: {found}", file=sys.stderr, flush=True)
        return row

    export, surgery = empty(work / "export"), empty(work / "surgery")
    stages = [
        measured("export", [sys.executable, "-m", "suture.export", "--checkpoint", checkpoint, "--weights", "reference",
                            "--out", export], export),
        measured("surgery", [sys.executable, "-m", "suture.surgery", export / "model.onnx", "--out", surgery], surgery),
    ]  # fmt: skip
    rows = [together(stages), *stages]
    if options.optimum:
        out = empty(work / "optimum")
        rows.append(measured("Optimum", [options.optimum, "-c", OPTIMUM, checkpoint, out], out))
        empty(out)
    out = empty(work / "genai")
    builder = ["-m", "onnxruntime_genai.models.builder", "-m", "x", "-i", checkpoint, "-o", out]
    builder += ["-c", work / "cache", "-p", "fp16", "-e", "cuda"]  # only for its CUDA provider is there float16
    rows.append(measured("onnxruntime-genai", [sys.executable, *builder], out))
    empty(out)
    return rows


def write_checkpoint(model: str, work: Path, holes: bool) -> Path:
    checkpoint, (name, _, layers) = work / "checkpoint", model.partition(":")
    if not (checkpoint / "config.json").is_file():
        source = ["--preset", name] if not name.endswith(".json") else ["--config", name]
        size = ["--layers", layers] * bool(layers) + ["--empty"] * holes
        work.mkdir(parents=True, exist_ok=True)
        check(measure([sys.executable, "-m", "suture.models.random_checkpoint", *source, *size, "--dtype", DTYPE,
                       "--out", str(checkpoint)]))  # fmt: skip
    if not (checkpoint / "tokenizer.json").is_file():
        check(measure([sys.executable, "-c", TOKENIZER, str(checkpoint)]))
    return checkpoint


def named(model: str) -> str:
    return model.removesuffix(".json").rpartition("/")[2]


def check(done: Run) -> None:
    if done.failure:
        raise UserError("the checkpoint", f"cannot be written ({done.failure})", "run suture.models.random_checkpoint alone")


def together(stages: list[ExporterRun]) -> ExporterRun:
    """One after the other: times and bytes add up, the largest peak counts."""
    first = stages[0]
    sums = (sum(getattr(stage, key) for stage in stages) for key in ("seconds", "cpu_seconds"))
    peak, written = max(stage.peak for stage in stages), sum(stage.written for stage in stages)
    failure = next((stage.failure for stage in stages if stage.failure), None)
    return ExporterRun(first.model, first.checkpoint_bytes, "Suture", *sums, peak, written, failure)


def table(rows: list[ExporterRun]) -> Table:
    shown = Table("checkpoint", "tool", "seconds", "of all cores", "×", "peak memory", "×", "written", "")
    for row in rows:
        ours = next(each for each in rows if (each.model, each.tool) == (row.model, "Suture"))
        ratios = [f"{mine / ours_:.1f}" for mine, ours_ in ((row.cpu_seconds, ours.cpu_seconds), (row.peak, ours.peak))]
        shown.add_row(
            f"{named(row.model)}, {gigabytes(row.checkpoint_bytes)}" if row is ours else "",
            row.tool if row.tool not in ("export", "surgery") else f"  {row.tool}",
            f"{row.seconds:.1f}",
            f"{row.cpu_seconds:.1f}",
            ratios[0],
            gigabytes(row.peak),
            ratios[1],
            gigabytes(row.written) if row.written > 1e8 else f"{row.written / 1e6:.1f} MB",
            (row.failure or "")[:120],
        )
    return shown


if __name__ == "__main__":
    run("peers", main)
