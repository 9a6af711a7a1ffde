"""What an engine's decode step costs before and after surgery, read from the builder's list of kernels: no GPU needed.

    python benchmarks/engine_cost.py                 # tiny-qwen: a minute
    python benchmarks/engine_cost.py --size wide     # two layers of Qwen-7B, random weights: 3.3 GB in --work, minutes
    python benchmarks/engine_cost.py --dir DIR       # a pipeline's folder with export/ and surgery/

One sequence, one token, cache full. The exported graph is built as it is, its shapes fixed to that step. The floor is
what any engine must move: weights read once, cache read once, logits written once.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import onnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from suture.build.cost import kernels_a_layer, over_floor  # noqa: E402
from suture.core.signature import find_signature  # noqa: E402
from suture.core.weights import place_weights  # noqa: E402

CAPACITY = 2048
BUILDS = {  # of the lowered graph
    "constants, one profile": ["--profiles", "one"],
    "constants, two profiles": ["--profiles", "two"],
    "weights as inputs, two profiles": ["--weights", "input"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a decode step before and after surgery, without a GPU.")
    parser.add_argument("--size", choices=("tiny", "wide"), default="tiny")
    parser.add_argument("--dir", type=Path, help="a pipeline's folder, instead of --size")
    parser.add_argument("--capability", default="8.9", help="the GPU to build for (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="graphs and engines go here (%(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the bytes as bars")
    options = parser.parse_args()
    work = (options.work / f"engine_cost-{options.size}").resolve()
    folder = options.dir.resolve() if options.dir else prepare(options.size, work)
    table = Table("graph", "engine", "profile", "kernels", "a layer", "MB a token", "of them copies", "× floor", "engine MB")
    engines = {}
    for name, model, arguments in jobs(folder, work):
        out = work / "engines" / re.sub(r"\W+", "-", name)
        failure = _run("build", model, "--out", out, "--compute-capability", options.capability, *arguments)
        if failure:
            table.add_row(*name.split(": "), failure)
        else:
            engines[name] = json.loads((out / "engine.json").read_text())
            _add_rows(table, name, engines[name])
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if options.picture:
        draw(engines, options.picture)


def jobs(folder: Path, work: Path) -> list[tuple[str, Path, list[str]]]:
    exported = fixed_step(folder / "export" / "model.onnx", work / "exported")
    lowered = folder / "surgery" / "model.trt.onnx"
    return [("exported: constants, fixed shapes", exported, [])] + [
        (f"lowered: {name}", lowered, arguments) for name, arguments in BUILDS.items()
    ]


def fixed_step(model: Path, out: Path) -> Path:
    """The growing graph in file `model` with the shapes of one decode step: batch 1, one token, 2047 before it."""
    proto = onnx.load(model, load_external_data=False)
    signature = find_signature(proto, model)
    past = {cache.past for cache in signature.caches}
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        sizes = [1, dims[1].dim_value, CAPACITY - 1, dims[3].dim_value] if value.name in past else [1] * len(dims)
        if value.name == signature.mask:
            sizes[-1] = CAPACITY
        for dim, size in zip(dims, sizes):
            dim.Clear()
            dim.dim_value = size
    for value in proto.graph.output:
        value.type.tensor_type.shape.dim[0].dim_value = 1
        value.type.tensor_type.shape.dim[2 if value.name != signature.logits else 1].dim_value = (
            CAPACITY if value.name != signature.logits else 1
        )
    del proto.graph.value_info[:]
    out.mkdir(parents=True, exist_ok=True)
    root = place_weights(proto, model, out, out)
    onnx.save(proto, out / "model.onnx")
    (out / "manifest.json").write_text(json.dumps({"outputs": {"model.onnx": 0}, "weights_root": root}))
    return out / "model.onnx"


def prepare(size: str, work: Path) -> Path:
    """A float16 pipeline's export and surgery."""
    source = ["--model", "tiny-qwen"]
    if size == "wide":
        checkpoint = work / "checkpoint"
        if not (checkpoint / "config.json").is_file():
            made = ["--preset", "qwen-7b", "--layers", "2", "--dtype", "float16", "--out", checkpoint]
            _check(_run("models.random_checkpoint", *made))
        source = ["--checkpoint", checkpoint]
    _check(_run("export", *source, "--out", work / "export", "--dtype", "float16"))
    _check(_run("surgery", work / "export" / "model.onnx", "--out", work / "surgery", "--capacity", CAPACITY))
    return work


def draw(engines: dict[str, dict], out: Path) -> None:
    """Bars of the bytes that a decoding step moves, by kind, and the floor as a line."""
    rows = [(f"{name}, {profile['name']}", profile) for name, engine in engines.items() for profile in engine["profiles"]]
    rows = [(name, profile) for name, profile in reversed(rows) if profile["decode_bytes"]]
    figure = Figure(figsize=(9, 0.8 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    start = [0.0] * len(rows)
    for kind, label in (("weights", "weights"), ("cache", "caches"), ("other", "the rest, copies of caches included")):
        sizes = [profile["decode_bytes"][kind] / 1e6 for _, profile in rows]
        axes.barh([name for name, _ in rows], sizes, left=start, label=label)
        start = [left + size for left, size in zip(start, sizes)]
    axes.axvline(rows[0][1]["floor_bytes"] / 1e6, color="black", linewidth=1, label="floor")
    axes.set_xlabel("MB that a decoding step moves (one sequence, one token, cache full)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out)


def _add_rows(table: Table, name: str, engine: dict) -> None:
    for profile in engine["profiles"]:
        moved, copied, floor = profile["decode_bytes"], profile["copied_bytes"], over_floor(profile)
        table.add_row(
            *name.split(": "),
            profile["name"],
            str(profile["kernels"]),
            kernels_a_layer(profile),
            f"{sum(moved.values()) / 1e6:,.1f}" if moved else "unknown",
            f"{copied / 1e6:,.1f}" if moved else "unknown",
            f"{floor:.3f}" if floor else "unknown",
            f"{engine['engine_bytes'] / 1e6:,.1f}",
        )


def _run(module: str, *arguments) -> str | None:
    """The last line of what went wrong, or None."""
    print(f"python -m {module}", *arguments, file=sys.stderr)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return (done.stderr.strip().splitlines() or ["failed"])[-1] if done.returncode else None


def _check(failure: str | None) -> None:
    if failure:
        sys.exit(failure)


if __name__ == "__main__":
    main()
