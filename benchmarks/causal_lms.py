"""python -m benchmarks.causal_lms [MODEL_TYPE ...] [--seconds N]: docs/causal_lms.md's table, or some of its rows again.

Every class that transformers has for causal language modelling, at a tiny random size in the layout in which transformers
publishes it: export from the checkpoint and, of the graph, how far its logits are from transformers' own of the whole text;
surgery, which proves both graphs that it writes; build, for one architecture. Or the one line with which it was refused. Rows
are kept in docs/measurements/causal_lms.json as they are made, and the page is made from them.
"""

import contextlib
import io
import json
import multiprocessing
import re
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.tables import DOCS, put
from suture.core import arguments
from suture.core.command import CommandParser, run
from suture.core.errors import UserError
from suture.core.refusals import said

COMMAND = "python -m benchmarks.causal_lms"
PAGE, ROWS = DOCS / "causal_lms.md", DOCS / "measurements" / "causal_lms.json"
HEADINGS = ("model_type", "of transformers'", "nodes", "fused", "proven", "engine")
FUSED = ("Attention", "RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Swish", "Gelu", "TensorScatter")
CAPACITY, ARCHITECTURE = 64, "8.9"

Row = dict[str, str]


def main() -> None:
    parser = CommandParser(
        prog="benchmarks.causal_lms", description="Every causal language model of transformers, to an engine."
    )
    parser.add_argument("model_type", nargs="*", help="(all)")
    parser.add_argument("--seconds", type=arguments.whole(1, 86_400), default=600, help="that one may take (%(default)s)")
    given = parser.parse_args()
    from tests.causal_lms import names  # only now: it imports transformers

    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    for name in given.model_type or names():
        rows[name] = _in_a_child(name, given.seconds)
        print(_line({"model_type": name, **rows[name]}), flush=True)
        ROWS.write_text(json.dumps({name: rows[name] for name in names() if name in rows}, indent=1) + "\n")
        PAGE.write_text(put(PAGE.read_text(), COMMAND, table({name: rows[name] for name in names() if name in rows})))


def table(rows: dict[str, Row]) -> str:
    built = sum(row.get("engine") == "built" for row in rows.values())
    summary = f"{len(rows)} classes: {built} from checkpoint to engine, {len(rows) - built} not, each with its reason.\n"
    lines = [_line({"model_type": name, **row}) for name, row in rows.items()]
    return "\n".join([summary, f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}", *lines])


def _in_a_child(name: str, limit: float) -> Row:
    """A fork, so that nothing is imported again; what it cannot do, or not in time, is the row's last column."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_row, args=(name, there))
    child.start()
    there.close()
    row: Row = {}
    with contextlib.suppress(EOFError):
        while here.poll(limit):
            row |= here.recv()
        row |= {"engine": f"not done in {limit} s"}
        child.kill()
    child.join()
    return row if "engine" in row else {**row, "engine": "the process died"}


def _row(name: str, columns: Connection) -> None:
    """Sends each step's columns as it is done."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            columns.send(_exported(name, Path(folder)))
            columns.send(_operated(Path(folder)) | {"proven": _worst(printed.getvalue())})
            columns.send(_built(Path(folder)))
        except UserError as error:
            columns.send({"engine": f"refused: {error.parts[1].replace(folder + '/', '')}".replace("|", "/")})
        except Exception as error:  # transformers' or the tracer's own, which the row says
            columns.send({"engine": f"{type(error).__name__}: {said(error)}".replace("|", "/")})


def _exported(name: str, work: Path) -> Row:
    from suture import export_checkpoint
    from tests.causal_lms import error_of, tiny_config, write_checkpoint

    write_checkpoint(tiny_config(name), work / "checkpoint")
    export_checkpoint(work / "checkpoint", work / "export", dtype="float32")
    return {"of transformers'": f"{error_of(work / 'export' / 'model.onnx', work / 'checkpoint'):.1e}"}


def _operated(work: Path) -> Row:
    import onnx

    from suture.surgery.options import SurgeryOptions
    from suture.surgery.stage import surgery

    if surgery(work / "export" / "model.onnx", work / "surgery", SurgeryOptions(capacity=CAPACITY)):
        raise UserError(work, "surgery's graphs differ from the exported one")
    before, after = (onnx.load(work / stage / "model.onnx", load_external_data=False) for stage in ("export", "surgery"))
    counts = {op: sum(node.op_type == op for node in after.graph.node) for op in FUSED}
    return {
        "nodes": f"{len(before.graph.node)} → {len(after.graph.node)}",
        "fused": ", ".join(f"{count} {op}" for op, count in counts.items() if count),
    }


def _worst(printed: str) -> str:
    found = re.search(r"surgery: proven in .*\(worst error (.*?) in", printed)
    return found[1] if found else "in part"


def _built(work: Path) -> Row:
    from suture import build_engine

    build_engine(work / "surgery" / "model.trt.onnx", work / "build", compute_capability=[ARCHITECTURE])
    return {"engine": "built"}


def _line(row: Row) -> str:
    return f"| {' | '.join(row.get(heading, '') for heading in HEADINGS)} |"


if __name__ == "__main__":
    run("benchmarks.causal_lms", main)
