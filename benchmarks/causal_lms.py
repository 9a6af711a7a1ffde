"""python -m benchmarks.causal_lms [MODEL_TYPE ...] [--again] [--seconds N]: docs/causal_lms.md's table.

It makes the rows that are still missing, and may be stopped and started again; or those of the names given, or all --again.

Every class that transformers has for causal language modelling, at a tiny random size in the layout in which transformers
publishes it: export from the checkpoint and, of the graph, how far its logits are from transformers' own of the whole text;
surgery, which proves both graphs that it writes; build, for one architecture. Or the one line with which it was refused. Rows
are kept in docs/measurements/causal_lms.json as they are made, and the page is made from them. A class takes 15 seconds of one
CPU, most of it in torch.export.
"""

import contextlib
import io
import json
import multiprocessing
import re
import resource
import signal
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
FIRST = (  # of the rows to make: what people deploy most
    "llama", "qwen3", "qwen2", "mistral", "gemma2", "gemma3_text", "gpt_oss", "qwen3_moe", "phi3", "deepseek_v3", "mixtral",
    "glm4", "olmo2", "smollm3", "granite", "stablelm", "starcoder2", "cohere", "cohere2", "falcon", "bloom", "gpt_neox", "gptj",
    "gpt_neo", "opt", "phi", "qwen2_moe", "gemma", "glm", "olmo", "olmoe", "olmo3", "exaone4", "ernie4_5", "ernie4_5_moe",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "granitemoe", "deepseek_v2", "glm4_moe", "dots1", "minimax", "nemotron", "llama4_text",
    "seed_oss", "codegen", "xglm", "persimmon", "helium", "arcee", "apertus", "bitnet", "phimoe", "gpt_bigcode", "gpt2", "mpt",
)  # fmt: skip

Row = dict[str, str]


def main() -> None:
    parser = CommandParser(
        prog="benchmarks.causal_lms", description="Every causal language model of transformers, to an engine."
    )
    parser.add_argument("model_type", nargs="*", help="(those without a row)")
    parser.add_argument("--again", action="store_true", help="all, those with a row, too")
    parser.add_argument(
        "--seconds", type=arguments.whole(1, 86_400), default=600, help="of processor time that one may take (%(default)s)"
    )
    given = parser.parse_args()
    names = _import_all()
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    ordered = sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    for name in given.model_type or [name for name in ordered if given.again or name not in rows]:
        rows[name] = _in_a_child(name, given.seconds)
        print(_line({"model_type": name, **rows[name]}), flush=True)
        kept = {name: rows[name] for name in sorted(set(names) & set(rows))}
        ROWS.write_text(json.dumps(kept, indent=1) + "\n")
        PAGE.write_text(put(PAGE.read_text(), COMMAND, table(kept)))


def _import_all() -> list[str]:
    """All that a row needs, once for all rows: imports and the tracer's tables are half of a row's time. Returns the names."""
    import torch

    import suture.build.stage
    import suture.export.trace
    import suture.surgery.stage  # noqa: F401
    from tests.causal_lms import names

    shapes = ({0: torch.export.Dim.AUTO},)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(torch.nn.Linear(2, 2).eval(), (torch.zeros(2, 2),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    return names()


def table(rows: dict[str, Row]) -> str:
    built = sum(row.get("engine") == "built" for row in rows.values())
    summary = f"{len(rows)} classes: {built} from checkpoint to engine, {len(rows) - built} not, each with its reason.\n"
    lines = [_line({"model_type": name, **row}) for name, row in rows.items()]
    return "\n".join([summary, f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}", *lines])


def _in_a_child(name: str, limit: int) -> Row:
    """A fork, so that nothing is imported again; what it cannot do, or not in time, is the row's last column. Time is the
    processor's: on a busy machine a row takes as long as it takes."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_row, args=(name, there, limit))
    child.start()
    there.close()
    row: Row = {}
    with contextlib.suppress(EOFError):
        while True:
            row |= here.recv()
    child.join()
    late = child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
    return {"engine": f"not done in {limit} s" if late else "the process died"} | row


def _row(name: str, columns: Connection, limit: int) -> None:
    """Sends each step's columns as it is done."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
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
