"""python -m benchmarks.causal_lms [MODEL_TYPE ...] [--seconds N]: docs/causal_lms.md's table, or only rows of it, printed.

Every class that transformers has for causal language modelling, at a tiny random size in the layout in which transformers
publishes it: `export --checkpoint` and, of the graph, how far its logits are from transformers' own of the whole text; surgery,
which proves both graphs that it writes; build, for one architecture. Or the one line with which it was refused.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from benchmarks.processes import ROOT
from benchmarks.tables import DOCS, put
from suture.core import arguments

COMMAND = "python -m benchmarks.causal_lms"
PAGE = DOCS / "causal_lms.md"
HEADINGS = ("model_type", "export", "of transformers'", "nodes", "fused", "proven", "engine")
FUSED = ("Attention", "RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Swish", "Gelu", "TensorScatter")
OPTIONS = {"surgery": ("--capacity", 64), "build": ("--compute-capability", "8.9")}


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND.removeprefix("python -m "), description=__doc__.split("\n")[2])
    parser.add_argument("model_type", nargs="*", help="(all)")
    parser.add_argument(
        "--seconds", type=arguments.whole(1, 86400), default=600, help="that each step of one may take (%(default)s)"
    )
    given = parser.parse_args()
    from tests.causal_lms import names  # only now: it imports transformers

    rows = []
    print(f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}", sep="\n", flush=True)
    for name in given.model_type or names():
        rows.append(row(name, given.seconds))
        print(_line(rows[-1]), flush=True)
    if not given.model_type:
        PAGE.write_text(put(PAGE.read_text(), COMMAND, table(rows)))


def table(rows: list[dict[str, str]]) -> str:
    built = sum(row["engine"] == "built" for row in rows)
    summary = f"{len(rows)} classes: {built} from checkpoint to engine, {len(rows) - built} not, each with its reason.\n"
    return "\n".join([summary, f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}", *map(_line, rows)])


def row(name: str, limit: float) -> dict[str, str]:
    """One class's columns; the first that could not be filled holds the reason."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        columns = {"model_type": name}
        for step in (_export, _surgery, _build):
            try:
                columns |= step(name, work, limit)
            except subprocess.CalledProcessError as error:
                columns[step.__name__.strip("_").replace("build", "engine").replace("surgery", "nodes")] = _reason(
                    error, folder
                )
                break
            except subprocess.TimeoutExpired:
                columns["export"] = f"not done in {limit:.0f} s"
                break
    return dict.fromkeys(HEADINGS, "") | columns


def _export(name: str, work: Path, limit: float) -> dict[str, str]:
    code = (
        "import json, sys; from pathlib import Path; from tests.causal_lms import *; work = Path(sys.argv[2]);"
        "write_checkpoint(tiny_config(sys.argv[1]), work / 'checkpoint')"
    )
    _run(limit, "-c", code, name, work)
    _run(limit, "-m", "suture", "export", "--checkpoint", work / "checkpoint", "--dtype", "float32", "--out", work / "export")
    code = (
        "import sys; from pathlib import Path; from tests.causal_lms import *; work = Path(sys.argv[1]);"
        "print(error_of(work / 'export' / 'model.onnx', work / 'checkpoint'))"
    )
    error = float(_run(limit, "-c", code, work).splitlines()[-1])
    return {"export": "written", "of transformers'": f"{error:.1e}"}


def _surgery(name: str, work: Path, limit: float) -> dict[str, str]:
    out = work / "surgery"
    said = _run(limit, "-m", "suture", "surgery", work / "export" / "model.onnx", "--out", out, *OPTIONS["surgery"])
    before, after = (onnx.load(folder / "model.onnx", load_external_data=False) for folder in (work / "export", out))
    counts = {op: sum(node.op_type == op for node in after.graph.node) for op in FUSED}
    proof = json.loads((out / "manifest.json").read_text())["proof"]
    worst = re.search(r"proven .*worst error (.*?) in", said)
    return {
        "nodes": f"{len(before.graph.node)} → {len(after.graph.node)}",
        "fused": ", ".join(f"{count} {op}" for op, count in counts.items() if count),
        "proven": worst[1] if worst and proof["status"] == "passed" and proof["complete"] else f"{proof['status']}, in part",
    }


def _build(name: str, work: Path, limit: float) -> dict[str, str]:
    lowered = work / "surgery" / "model.trt.onnx"
    _run(limit, "-m", "suture", "build", lowered, "--out", work / "build", *OPTIONS["build"])
    return {"engine": "built"}


def _run(limit: float, *arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=limit).stdout


def _reason(error: subprocess.CalledProcessError, folder: str) -> str:
    line = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
    return re.sub(r"^\w+: ", "", line).replace(f"{folder}/", "").replace("|", "/")


def _line(row: dict[str, str]) -> str:
    return f"| {' | '.join(row.values())} |"


if __name__ == "__main__":
    main()
