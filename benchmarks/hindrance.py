"""Whether surgery hinders TensorRT: the engine of each graph as it was exported against that of its lowered graph.

    python -m benchmarks.hindrance                        # every graph in tests/graphs: 20 minutes on two cores
    python -m benchmarks.hindrance --only sam_vision      # those whose names have this in them
    python -m benchmarks.hindrance GRAPH.onnx ...         # others

Both engines are for the same fixed shapes: of a decoder one sequence, one token, the source's cache as long as the lowered
graph's static one; of other graphs what is dynamic gets one size. Kernels and bytes are what build reads from the builder's log, so
nothing runs and no GPU is needed. Exit status 1 where a lowered graph has more than one kernel a layer more than its
source, or moves more bytes.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

from suture.build import process
from suture.build.cost import add_cost, describe_graph
from suture.build.worker import Job
from suture.core.errors import UserError
from suture.core.progress import shown
from suture.core.signature import Signature, find_signature
from suture.core.weights import load_graph, weights_root
from tests.graphs import weightless

ROOT = Path(__file__).parents[1]
CAPACITY, SEQUENCE = 64, 16  # slots of a cache; every other dynamic size but the batch


@dataclass(frozen=True)
class EngineCost:
    """Of one engine."""

    kernels: int
    bytes: int | None  # moved in one run; None where the builder's log does not say
    layers: int


@dataclass(frozen=True)
class EnginePair:
    """A graph's engines; `refused` says in one line why there are not two."""

    graph: str
    source: EngineCost | None = None
    lowered: EngineCost | None = None
    refused: str = ""

    @property
    def hindered(self) -> str:
        """What is worse in the lowered graph, or nothing."""
        if self.source is None or self.lowered is None:
            return ""
        worse, layers = [], max(self.source.layers, self.lowered.layers, 1)
        if self.lowered.kernels > self.source.kernels + layers:
            worse.append(f"{self.lowered.kernels - self.source.kernels} kernels more, {layers} layers")
        if self.source.bytes and self.lowered.bytes and self.lowered.bytes > self.source.bytes:
            worse.append(f"{(self.lowered.bytes - self.source.bytes) / 1e3:,.1f} kB more")
        return ", ".join(worse)


def compare(graph: str, proto: onnx.ModelProto, work: Path, capability: str = "8.9") -> EnginePair:
    """Builds both engines of `proto` in the folder `work`. What cannot be built on either side is said, not raised."""
    source = work / "source.onnx"
    onnx.save(proto, source)
    out = work / "surgery"
    command = [sys.executable, "-m", "suture.surgery", str(source), "--out", str(out), "--capacity", str(CAPACITY), "--force"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return EnginePair(graph, refused=f"surgery: {_last_line(done.stderr or done.stdout)}")
    costs = []
    for name, model in (("source", source), ("lowered", out / "model.trt.onnx")):
        try:
            costs.append(cost(model, work, capability))
        except (UserError, RuntimeError) as error:
            return EnginePair(graph, *costs, refused=f"{name}: {_last_line(str(error))}")
    return EnginePair(graph, *costs)


def cost(model: Path, work: Path, capability: str) -> EngineCost:
    """What the engine of the graph in file `model` costs at fixed shapes. Raises UserError where it cannot be built."""
    proto = load_graph(model)
    signature = _signature(proto)
    fix_shapes(proto, signature)
    fixed = model.with_name(f"{model.stem}.fixed.onnx")
    onnx.save(proto, fixed)
    job = Job(
        fixed,
        weights_root(model),
        work / "model.engine",
        "rtx",
        (capability,),
        signature,
        (),
        frozenset(),
        work / "timings.cache",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # its progress
        result = process.build(job)
    job.engine.unlink()
    listed = result["kernels"][0]
    add_cost(listed, describe_graph(proto, signature))
    moved = listed["decode_bytes"]
    layers = signature.layers if signature else max(result["layers"].get("ATTENTION_INPUT", 0), len(listed["kernels_by_layer"]))
    return EngineCost(listed["kernels"], sum(moved.values()) if moved else None, layers)


def fix_shapes(proto: onnx.ModelProto, signature: Signature | None) -> None:
    """Gives every dynamic dimension of the inputs a size, in place; drops shapes inside the graph that had a name there."""
    del proto.graph.value_info[:]
    places: dict[tuple[str | None, int], int] = {}
    if signature:
        places = {(cache.past, 2): CAPACITY for cache in (*signature.caches, *signature.encoder_caches)}
        places |= {(signature.tokens, 1): 1, (signature.positions, 1): 1, (signature.mask, 1): CAPACITY + 1}
    for value in proto.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                dim.dim_value = 1 if axis == 0 else places.get((value.name, axis), SEQUENCE)
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")


def graphs() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Every graph of tests/graphs with its weights."""
    for name in weightless.names():
        yield name, weightless.load(name)
    for folder in ("static", "genai", "vision"):
        for path in sorted((weightless.FOLDER / folder).glob("*.onnx.gz")):
            name = f"{folder}/{path.name.removesuffix('.onnx.gz')}"
            yield name, weightless.load(name)
    for path in sorted(weightless.FOLDER.glob("*/*.onnx")):
        yield f"{path.parent.name}/{path.stem}", weightless.filled(onnx.load(path, load_external_data=False))


def table(compared: list[EnginePair]) -> Table:
    found = Table("graph", "layers", "kernels", "lowered", "MB", "lowered", "")
    for each in compared:
        row = [each.graph, str(max(c.layers for c in (each.source, each.lowered) if c) if each.source else "")]
        row += [str(c.kernels) if c else "" for c in (each.source, each.lowered)]
        row += [f"{c.bytes / 1e6:,.3f}" if c and c.bytes else "" for c in (each.source, each.lowered)]
        found.add_row(*row, each.refused or each.hindered)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hindrance", description=__doc__.split("\n", 1)[0])
    parser.add_argument("graphs", nargs="*", type=Path, metavar="GRAPH.onnx", help="instead of those in tests/graphs")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="part of a graph's name; may be repeated")
    parser.add_argument("--compute-capability", default="8.9", metavar="X.Y", help="to build for (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    options = parser.parse_args()
    named = ((path.stem, weightless.filled(onnx.load(path, load_external_data=False))) for path in options.graphs)
    compared = []
    with shown("hindrance") as show:
        for name, proto in named if options.graphs else graphs():
            if not options.only or any(text in name for text in options.only):
                show(name, None)
                with tempfile.TemporaryDirectory() as work:
                    compared.append(compare(name, proto, Path(work), options.compute_capability))
    Console(width=None if sys.stdout.isatty() else 160).print(table(compared))
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in compared], indent=1) + "\n", encoding="utf-8")
    hindered = [each.graph for each in compared if each.hindered]
    refused = sum(bool(each.refused) for each in compared)
    print(f"{len(compared)} graphs, {refused} without both engines, {len(hindered)} hindered")
    return 1 if hindered else 0


def _signature(proto: onnx.ModelProto) -> Signature | None:
    try:
        return find_signature(proto)
    except UserError:
        return None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1][:300]


if __name__ == "__main__":
    sys.exit(main())
