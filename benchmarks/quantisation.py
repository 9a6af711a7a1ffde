"""What each quantised format does to text: tiny-qwen's held-out text, read and continued, against PyTorch in float32.

    python -m benchmarks.quantisation [--rows ROW ...] [--windows 48] [--new-tokens 256] [--work DIR] [--out FILE.json] [--plot FILE.svg]

Perplexity is over tokens. KL divergence is of the format's distribution from float32's, token by token, in nats. Agreement
is the share of greedily chosen tokens before the first that differs, and, over the text, of tokens where both would
choose the same.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo

from benchmarks.processes import stage
from suture.core.command import CommandParser, run
from suture.models.named import checkpoint_folder
from suture.models.tokenizer import Tokenizer, open_tokenizer
from suture.runtime.graphs import open_graph
from suture.validate.reference import open_reference
from suture.validate.runners import SteppedModel
from suture.validate.tokens import greedy, read

MODEL, DTYPE = "tiny-qwen", "float16"
WINDOW = 256  # tokens: the trained length
PROMPTS, PROMPT = 8, 64
CAPACITY = 512  # slots: more than what is read or continued needs
ROWS = {
    "float16": "",
    "int8": "--quantize int8",
    "int8-smoothquant": "--quantize int8-smoothquant",
    "fp8": "--quantize fp8",
    **{f"{name} cache": f"--cache growing --kv-cache {name}" for name in ("int8", "fp8")},
    **{f"{name}, {size}": f"--quantize {name} --group-size {size}" for size in (128, 64, 32) for name in ("int4", "int4-awq")},
}


@dataclass
class Row:
    format: str
    bytes: int
    perplexity: float
    change: float  # of perplexity, relative to float32's
    mean_kl: float
    kl_99: float
    agreement: float  # over the text
    greedy: float


def main() -> None:
    parser = CommandParser(prog="quantisation", description="Table of quantised formats by what they do to text.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--windows", type=int, default=48, help=f"of {WINDOW} tokens (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=256, help="chosen after each of 8 prompts (%(default)s)")
    parser.add_argument("--work", metavar="DIR", type=Path, help="keep the graphs here, and take those that are there")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the table as JSON")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="the table as a picture")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(options, options.work or Path(scratch))
    if options.out:
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)


def measure(options: argparse.Namespace, work: Path) -> list[Row]:
    checkpoint = checkpoint_folder(MODEL)
    tokenizer, reference = open_tokenizer(checkpoint), open_reference(checkpoint)
    ids = tokenizer.encode((checkpoint / "heldout.txt").read_text(encoding="utf-8"))
    stage("export", "--model", MODEL, "--dtype", DTYPE, "--out", work / "export")
    continued = continue_prompts(reference, ids, reference.trained_length, options.new_tokens)
    greedily = f"greedy, of {options.new_tokens}"
    print(f"| format | bytes | perplexity | change | mean KL | 99 % of KL | same likeliest token | {greedily} |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for name in options.rows:
        out = work / name.replace(", ", "-")
        stage("surgery", work / "export" / "model.onnx", "--out", out, "--capacity", CAPACITY, *ROWS[name].split())
        rows.append(measure_row(name, out / "model.onnx", reference, tokenizer, ids, options.windows, continued))
        print(line(rows[-1]), flush=True)
    return rows


def continue_prompts(model: SteppedModel, ids: list[int], trained_length: int, new_tokens: int) -> np.ndarray:
    """int64 [prompts, new_tokens]: the likeliest tokens after prompts from all over the text."""
    places = np.linspace(0, len(ids) - PROMPT, PROMPTS).astype(int)
    return greedy(model, [ids[place : place + PROMPT] for place in places], new_tokens, trained_length)


def measure_row(
    name: str, path: Path, reference: SteppedModel, tokenizer: Tokenizer, ids: list[int], windows: int, continued: np.ndarray
) -> Row:
    candidate = open_graph(path, name)
    reading = read(name, reference, candidate, tokenizer, ids, WINDOW, windows)
    ours, theirs = (2 ** np.mean(reading.bits_by_position[model.name]) for model in (reference, candidate))
    again = continue_prompts(candidate, ids, reference.trained_length, continued.shape[1])
    alike = np.cumprod(continued == again, axis=1).mean()
    return Row(
        name,
        stored(path),
        float(theirs),
        float(theirs / ours - 1),
        reading.mean_kl,
        reading.kl_99,
        reading.agreement,
        float(alike),
    )


def stored(path: Path) -> int:
    """Bytes of a graph's weights, scales included."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return sum(ExternalDataInfo(t).length if t.data_location else len(t.raw_data) for t in tensors)


def line(row: Row) -> str:
    return (
        f"| {row.format} | {row.bytes / 1e6:.2f} MB | {row.perplexity:.4f} | {row.change:+.2%} | {row.mean_kl:.2e} | "
        f"{row.kl_99:.2e} | {row.agreement:.1%} | {row.greedy:.0%} |"
    )


def plot(rows: list[Row], path: Path) -> None:
    """Each format's divergence, mean and 99th percentile, with the bytes that it takes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1))
    places, means, tails = range(len(rows)), [row.mean_kl for row in rows], [row.kl_99 for row in rows]
    axes.hlines(places, means, tails, color="#9bb4d0")
    axes.scatter(means, places, color="#3b6fb6", label="mean", zorder=2)
    axes.scatter(tails, places, color="white", edgecolor="#3b6fb6", label="99th percentile", zorder=2)
    axes.set_yticks(places, [f"{row.format}   {row.bytes / 1e6:.1f} MB" for row in rows])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="KL divergence from float32, nats a token")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    run("quantisation", main)
