"""Time and memory of graph tools on the same graph, each in a process of its own.

    python -m benchmarks.surgery                     # tiny-qwen: seconds
    python -m benchmarks.surgery --size full         # 3.7 GB of float16 weights in --work: minutes
    python -m benchmarks.surgery --curve             # time of surgery against nodes, up to 100,000
    python -m benchmarks.surgery --model MODEL.onnx  # your graph

The peers are in requirements-bench.txt. What they do differs: all remove what is unused and fold constants, only
Suture and onnxruntime's optimizer fuse, only Suture changes the cache. What is compared is what a graph costs to touch.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.processes import ROOT, Run, empty, gigabytes, measure

OURS = "Suture surgery"
CURVE = (1_000, 3_000, 10_000, 30_000, 100_000)  # nodes
FULL = {  # Qwen's architecture at 1.8 billion parameters
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 2048, "num_hidden_layers": 24,
    "num_attention_heads": 16, "kv_channels": 128, "intermediate_size": 11008, "vocab_size": 151936, "seq_length": 8192,
    "max_position_embeddings": 32768, "rotary_emb_base": 10000, "rotary_pct": 1.0, "layer_norm_epsilon": 1e-06,
    "no_bias": True, "use_dynamic_ntk": True, "use_logn_attn": True, "tie_word_embeddings": False,
    "scale_attn_weights": True, "torch_dtype": "float16",
}  # fmt: skip


def suture(model: Path, out: Path) -> list[str]:
    return ["-m", "suture.surgery", str(model), "--out", str(out), "--force"]


def onnxslim(model: Path, out: Path) -> list[str]:
    return _code(f"import onnxslim; onnxslim.slim({str(model)!r}, {str(out / 'model.onnx')!r}, save_as_external_data=True)")


def polygraphy(model: Path, out: Path) -> list[str]:
    options = ["--fold-constants", "--save-external-data", "model.data", "-o", str(out / "model.onnx")]
    return [str(Path(sys.executable).with_name("polygraphy")), "surgeon", "sanitize", str(model), *options]


def graph_surgeon(model: Path, out: Path) -> list[str]:
    return _code(
        "import onnx, onnx_graphsurgeon as gs\n"
        f"graph = gs.import_onnx(onnx.load({str(model)!r}))\n"
        "made = gs.export_onnx(graph.fold_constants().cleanup().toposort())\n"
        f"onnx.save(made, {str(out / 'model.onnx')!r}, save_as_external_data=True, location='model.data')"
    )


def ort_optimizer(model: Path, out: Path) -> list[str]:
    options = ["--input", str(model), "--output", str(out / "model.onnx"), "--model_type", "gpt2", "--opt_level", "0"]
    return ["-m", "onnxruntime.transformers.optimizer", *options, "--use_external_data_format"]


TOOLS: dict[str, Callable[[Path, Path], list[str]]] = {
    OURS: suture,
    "graph-surgeon, eager": graph_surgeon,
    "OnnxSlim": onnxslim,
    "onnxruntime.transformers optimizer": ort_optimizer,
    "polygraphy surgeon sanitize": polygraphy,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of graph tools on the same graph.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--size", choices=("tiny", "full"), default="tiny")
    source.add_argument("--model", type=Path, metavar="MODEL.onnx")
    source.add_argument("--curve", action="store_true", help="surgery alone, on graphs of more and more nodes")
    parser.add_argument("--most", type=int, default=CURVE[-1], metavar="NODES", help="where the curve ends (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="graphs and results go here (%(default)s)")
    options = parser.parse_args()
    work, console = options.work.resolve(), Console(width=128)
    if options.curve:
        console.print(curve(tiny(work), options.most, work))
    else:
        model = options.model.resolve() if options.model else {"tiny": tiny, "full": full}[options.size](work)
        console.print(compare(model, work))


def compare(model: Path, work: Path) -> Table:
    """Every tool on one graph, slowest last."""
    runs = {name: _run(command(model, empty(work / "result"))) for name, command in TOOLS.items()}
    weights = sum(path.stat().st_size for path in model.parent.iterdir() if path.suffix in (".safetensors", ".data"))
    table = Table("tool", "seconds", "of all cores", "peak memory", "time ×", "memory ×", "")
    table.title = f"{_nodes(model)} nodes, {weights / 1e9:.2f} GB of weights"
    ours = runs[OURS]
    for name, run in runs.items():
        ratios = f"{run.seconds / ours.seconds:.1f}", f"{run.peak / ours.peak:.1f}"
        table.add_row(
            name, f"{run.seconds:.2f}", f"{run.cpu_seconds:.2f}", gigabytes(run.peak), *ratios, (run.failure or "")[:120]
        )
    return table


def curve(model: Path, most: int, work: Path) -> Table:
    """Surgery on tiny-qwen with its third layer repeated."""
    table = Table("nodes", "seconds", "of all cores", "ms a node", "peak memory", title="surgery, by the size of the graph")
    for nodes in [count for count in CURVE if count <= most]:
        grown = work / f"nodes-{nodes}" / "model.onnx"
        if not grown.is_file():
            grown.parent.mkdir(parents=True, exist_ok=True)
            repeat = ["-m", "benchmarks.repeat_layer", str(model), str(grown), str(nodes)]
            subprocess.run([sys.executable, *repeat], cwd=ROOT, check=True)
        run = _run(suture(grown, empty(work / "result")))
        count = _nodes(grown)
        table.add_row(f"{count:,}", run.failure or f"{run.seconds:.2f}", f"{run.cpu_seconds:.2f}",
                      f"{1e3 * run.cpu_seconds / count:.2f}", gigabytes(run.peak))  # fmt: skip
    return table


def tiny(work: Path) -> Path:
    return _export(work / "tiny", "--model", "tiny-qwen", "--dtype", "float32")


def full(work: Path) -> Path:
    """A checkpoint with random weights, and its export beside it, so that every tool finds the weights by itself."""
    checkpoint = work / "full"
    if not (checkpoint / "config.json").is_file():
        work.mkdir(parents=True, exist_ok=True)
        config = work / "full.json"
        config.write_text(json.dumps(FULL))
        command = ["--config", str(config), "--out", str(checkpoint), "--dtype", "float16"]
        subprocess.run([sys.executable, "-m", "suture.models.random_checkpoint", *command], cwd=ROOT, check=True)
    return _export(checkpoint, "--checkpoint", str(checkpoint), "--weights", "reference")


def _export(out: Path, *options: str) -> Path:
    subprocess.run([sys.executable, "-m", "suture.export", *options, "--out", str(out)], cwd=ROOT, check=True)
    return out / "model.onnx"


def _run(arguments: list[str]) -> Run:
    return measure([sys.executable, *arguments])


def _nodes(model: Path) -> int:
    count = f"import onnx; print(len(onnx.load({str(model)!r}, load_external_data=False).graph.node))"
    return int(subprocess.run([sys.executable, "-c", count], check=True, capture_output=True, text=True).stdout)


def _code(text: str) -> list[str]:
    return ["-c", text]


if __name__ == "__main__":
    main()
