"""Tables of what gpu_decode measured, as Markdown, and a picture of its kernels.

python -m benchmarks.gpu_tables docs/measurements/h200-surgered.json ... [--picture kernels.svg]
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

from suture.core.command import CommandParser, run

NAMES = {
    "surgered-cuda-graph": "portable graph, CUDA graph",
    "surgered-onnxruntime-cuda-graph": "onnxruntime's operators, CUDA graph",
    "surgered": "portable graph, no CUDA graph",
    "int4-cuda-graph": "portable graph, INT4 weights, CUDA graph",
    "int8-cuda-graph": "portable graph, INT8 weights, CUDA graph",
    "int4-onnxruntime-cuda-graph": "onnxruntime's operators, INT4 weights, CUDA graph",
    "int8-onnxruntime-cuda-graph": "onnxruntime's operators, INT8 weights, CUDA graph",
    "exported": "the export before surgery",
    "eager": "transformers, eager",
    "compiled-reduce-overhead": "transformers, torch.compile reduce-overhead",
    "compiled-max-autotune": "transformers, torch.compile max-autotune",
}


def main() -> None:
    parser = CommandParser(prog="gpu_tables", description="Print what gpu_decode measured as tables.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="of the files' kernels, SVG or PNG")
    options: argparse.Namespace = parser.parse_args()
    measured = {path.stem: json.loads(path.read_text()) for path in options.files}
    for name, content in measured.items():
        print(f"\n{name}: {_limits(content['limits'])}\n\n{results(content['results'])}")
        if content["kernels"]:
            print(f"\n{kernels(content['kernels'])}")
    if options.picture:
        draw(
            {_cell(content): kinds(content["kernels"]) for content in measured.values() if content["kernels"]}, options.picture
        )


def results(rows: list[dict]) -> str:
    lines = ["| | cell | ms | tokens/s | GB/s | of the limit | error (eager's) |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        name = NAMES[row["run"]]
        if row["ms"] is None:
            if not row["note"].startswith("not run"):
                lines.append(f"| {name} | {row['cell']} | {row['note']} | | | | |")
            continue
        error = "not checked" if row["error"] is None else f"{row['error']:.1e} ({row['eager_error']:.1e})"
        lines.append(
            f"| {name} | {row['cell']} | {row['ms']:.2f} | {row['tokens_per_s']:,.0f} | {row['gb_per_s']:,.0f} "
            f"| {row['percent_of_limit']:.1f} % | {error} |"
        )
    return "\n".join(lines)


def kernels(found: list[dict]) -> str:
    rows = kinds(found)
    lines = ["| kernels | number | µs |", "|---|---|---|"]
    lines += [f"| {kind} | {count:.0f} | {us:,.0f} |" for kind, (count, us) in rows.items()]
    count, us = (sum(row[i] for row in rows.values()) for i in (0, 1))
    return "\n".join([*lines, f"| **all** | {count:,.0f} | **{us:,.0f}** |"])


def kinds(found: list[dict]) -> dict[str, tuple[float, float]]:
    """Number and microseconds of each kind of kernel, the longest first."""
    sums: dict[str, list[float]] = {}
    for kernel in found:
        entry = sums.setdefault(kernel["kind"], [0, 0])
        entry[0] += kernel["count"]
        entry[1] += kernel["us"]
    return {kind: (count, us) for kind, (count, us) in sorted(sums.items(), key=lambda item: -item[1][1])}


def draw(steps: dict[str, dict], picture: Path) -> None:
    """A bar a step, its kinds of kernels side by side, in shares of its time."""
    order = list(dict.fromkeys(kind for step in steps.values() for kind in step))
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.6 * len(steps)), layout="constrained")
    shown: set[str] = set()
    for index, step in enumerate(steps.values()):
        total, left = sum(us for _, us in step.values()), 0.0
        for kind, (_, us) in step.items():
            color = plt.get_cmap("tab20")(order.index(kind))
            axes.barh(index, us / total, left=left, color=color, label=kind if kind not in shown else None)
            shown.add(kind)
            left += us / total
        axes.text(1.01, index, f"{total / 1000:.2f} ms", va="center")
    axes.set_yticks(range(len(steps)), list(steps))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the kernels' time")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=5, loc="outside upper center", frameon=False, fontsize=8)
    figure.savefig(picture)


def _cell(content: dict) -> str:
    run = next(row for row in content["results"] if row["ms"] is not None)
    return f"{NAMES[run['run']].removesuffix(', CUDA graph')}\n{run['cell']}"


def _limits(limits: dict) -> str:
    copy, read, product = (limits[f"{name}_per_s"] for name in ("copy_bytes", "read_bytes", "matmul_flop"))
    return f"copy {copy / 1e9:,.0f} GB/s, read {read / 1e9:,.0f} GB/s, matrix products {product / 1e12:.1f} TFLOP/s"


if __name__ == "__main__":
    run("gpu_tables", main)
