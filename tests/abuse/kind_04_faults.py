"""Kind 4: a fault inside a stage, wherever and whatever it is, is 3 and never a difference; the pipeline stops there."""

import json
from pathlib import Path

from tests.abuse.case import FAULT, Case

PROMISE = "a fault of ours is status 3, one line, and a traceback in a file"
PLACES = {
    "export": ("suture.core.stage:Stage.up_to_date", "suture.export.stage:trace"),
    "compare": ("suture.validate.stage:subject_of", "suture.validate.stage:compare_two"),
    "golden": ("suture.validate.stage:find_pipeline", "suture.validate.golden:check"),
    "bundle": ("suture.validate.stage:find_pipeline", "suture.validate.levels:read_results"),
    "surgery.join": ("suture.surgery.connect:check_model", "suture.core.stage:Stage.writing"),
    "surgery.once": ("suture.surgery.stage:load_graph", "suture.surgery.stage:operate"),
    "surgery": ("suture.surgery.stage:load_graph", "suture.surgery.stage:operate", "suture.surgery.stage:settle",
                "suture.core.stage:Stage.writing"),
    "build": ("suture.build.stage:load_graph", "suture.build.stage:audit_graph", "suture.build.process:build"),
    "validate": ("suture.validate.stage:open_graph", "suture.validate.stage:compare_graphs", "suture.validate.stage:verdict"),
    "generate": ("suture.generate.command:open_model", "suture.generate.command:open_tokenizer", "suture.generate.batch:Batch.run"),
    "check": ("suture.validate.check:check", "suture.validate.check:_show"),
    "surgery.capacity": ("suture.core.weights:load_graph", "suture.surgery.graph.files:write"),
    "surgery.ranks": ("suture.core.weights:load_graph", "suture.surgery.parallel.stage:divided"),
    "convert": ("suture.models.pickles:convert", "suture.core.reader:status"),
}  # fmt: skip
ERRORS = ("RuntimeError", "ValueError", "KeyError", "AttributeError", "TypeError", "AssertionError", "ImportError", "IndexError",
          "ZeroDivisionError", "NotImplementedError", "ConnectionResetError", "EOFError", "SystemError", "StopIteration",
          "OverflowError")  # fmt: skip
ENDS = (-9, -11, -6, -15, -7, 3, 139, 134, 255, 1)  # of a stage: killed by a signal, a shell's word for that, Python's own


def passed(work: Path) -> None:
    """What an earlier run, which passed, has left of all stages."""
    contents = {"nodes": {"before": 2, "portable": 1}, "unfused": [], "engine_bytes": 1, "profiles": [], "verdict": "passed"}
    for stage, result in (
        ("export", "x.json"),
        ("surgery", "report.json"),
        ("build", "engine.json"),
        ("validate", "report.json"),
    ):
        (work / "out" / stage).mkdir(parents=True)
        (work / "out" / stage / result).write_text(json.dumps(contents))
        manifest = {"outputs": {}, "nodes": 1, "peak_memory_bytes": 1, "verdict": "passed"}
        (work / "out" / stage / "manifest.json").write_text(json.dumps(manifest))


CASES = [
    *(Case(4, stage, f"{error} in {place.partition(':')[2]}", PROMISE, lambda work: None, "a fault of this program", FAULT,
           fault=(place, error))
      for stage, places in PLACES.items() for place in dict.fromkeys(places) for error in ERRORS),
    *(Case(4, "pipeline", f"{stage} ends with {status}", PROMISE, passed, prints_not="passed", ended=(stage, status),
           expected=(1,) if (stage, status) == ("surgery", 1) else FAULT)  # which compares what it wrote
      for stage in ("export", "surgery", "build", "validate") for status in ENDS),
]  # fmt: skip
