"""python -m benchmarks.families [NAME ...]: docs/graphs.md's table of other exporters' graphs, or only rows of it, printed.

Every graph of tests/graphs (other exporters' graphs of each family, weights from a seed) and of ../shared/dialects, in its
own type and, where that is float32, converted to float16 as well: what surgery fused, how far the portable graph is from
the source through prompts and decoding in onnxruntime, how far TensorRT's parsed network is from the portable graph, and
whether TensorRT-RTX builds it.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import onnx
from onnx import TensorProto

from benchmarks.tables import GRAPHS, put
from suture.core.signature import find_signature
from suture.core.weights import load_graph, weights_root
from tests import decoding
from tests.graphs import weightless
from tests.graphs.retype import retyped
from tests.test_import_contrib_graphs import DIALECTS, at_full_accuracy
from tests.test_network_families import CAPACITY, network_error
from tests.test_scattered_cache import decode_static
from tests.test_surgery_families import DECOMPOSED, FUSED, counts, outputs

ROOT = Path(__file__).parents[1]
COMMAND = "python -m benchmarks.families"
GENAI = ("ort_genai018_qwen2_fp16_cuda", "ort_genai018_qwen2_int4_cpu")
ONE_TOKEN = ([7, 3, 5], [1, 1, 1], [1, 0, 1], [1, 1, 1])  # for masks that take a prompt or one more token
HEADINGS = ("graph (family, exporter, opset, type)", "nodes", "fused", "left decomposed",
            "onnxruntime, float32", "float16", "network, float32", "float16", "engine, float32", "float16")  # fmt: skip


@dataclass
class FamilyRow:
    """One graph in one type. Errors are of the largest value; None where there is nothing to compare."""

    nodes: str
    fused: str
    left: str
    surgery: float
    network: str
    engine: str


def main() -> None:
    names = sys.argv[1:] or [*weightless.names(), *(f"{folder}/{path.name.removesuffix('.onnx.gz')}"
                             for folder in ("genai", "static") for path in sorted((weightless.FOLDER / folder).glob("*.gz"))),
                             *(name for name in GENAI if (DIALECTS / name).is_dir())]  # fmt: skip
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    print(*lines, sep="\n", flush=True)
    failed = False
    for name in names:
        try:
            lines.append(row(name))
        except Exception as error:  # the other graphs are still worth a row
            failed = True
            lines.append(f"| {name} | fails: {str(error).strip().splitlines()[-1]} |{' |' * (len(HEADINGS) - 2)}")
        print(lines[-1], flush=True)
    if names != sys.argv[1:]:
        GRAPHS.write_text(put(GRAPHS.read_text(), COMMAND, "\n".join(lines)))
    sys.exit(failed)


def row(name: str) -> str:
    model, root = source_of(name)
    halves = any(value.type.tensor_type.elem_type == TensorProto.FLOAT16 for value in (*model.graph.input, *model.graph.output))
    models = {"float16" if halves else "float32": model}
    if not halves and "int4" not in name:
        models["float16"] = retyped(model, TensorProto.FLOAT16)
    found = {dtype: measure(name, each, root) for dtype, each in models.items()}
    first = next(iter(found.values()))
    assert all((each.fused, each.left) == (first.fused, first.left) for each in found.values()), name

    def cells(read: Callable[[FamilyRow], str]) -> list[str]:
        return [read(found[dtype]) if dtype in found else "" for dtype in ("float32", "float16")]

    columns = [name, first.nodes, first.fused, first.left, *cells(lambda each: f"{each.surgery:.1e}")]
    columns += [*cells(lambda each: each.network), *cells(lambda each: each.engine)]
    return f"| {' | '.join(columns)} |"


def source_of(name: str) -> tuple[onnx.ModelProto, Path]:
    if name in GENAI:
        return at_full_accuracy(load_graph(DIALECTS / name / "model.onnx")), DIALECTS / name
    return at_full_accuracy(weightless.load(name)), Path()


def measure(name: str, model: onnx.ModelProto, root: Path) -> FamilyRow:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source" / "model.onnx", Path(folder) / "out"
        source.parent.mkdir()
        onnx.save(onnx.load(root / "model.onnx") if name in GENAI else model, source)  # weights inside
        stage("surgery", source, "--out", out, "--capacity", CAPACITY)
        portable, lowered = out / "model.onnx", out / "model.trt.onnx"
        after = load_graph(portable)
        built = stage("build", lowered, "--out", Path(folder) / "build", "--compute-capability", "8.9", check=False)
        reason = (
            built.stderr.strip().splitlines()[-1].split(": ", 1)[-1].replace(folder, "").replace("|", "/")
            if built.stderr
            else ""
        )
        return FamilyRow(
            nodes=f"{len(model.graph.node)} → {len(after.graph.node)}",
            fused=", ".join(f"{count} {op}" for op, count in counts(after, FUSED).items()),
            left=", ".join(f"{count} {op}" for op, count in counts(after, DECOMPOSED).items()) or "nothing",
            surgery=surgery_error(name, model, root, after, weights_root(portable)),
            network="different" if (error := network_error(portable, lowered)) is None else f"{error:.1e}",
            engine="built" if built.returncode == 0 else reason,
        )


def surgery_error(name: str, source: onnx.ModelProto, root: Path, portable: onnx.ModelProto, portable_root: Path) -> float:
    with patch.object(decoding, "SCHEDULE", ONE_TOKEN if "genai/qwen3" in name else decoding.SCHEDULE):
        if not find_signature(portable, need_caches=False).caches:
            return decoding.largest_error({"": outputs(source)}, {"": outputs(portable)})
        if name.startswith("static/"):
            expected = decode_static(source)
        else:
            expected = decoding.decode(source, alone=True, root=root)
        return decoding.largest_error(expected, decoding.decode(portable, alone=False, root=portable_root))


def stage(name: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", name, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=check)


if __name__ == "__main__":
    main()
