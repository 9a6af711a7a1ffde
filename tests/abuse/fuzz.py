"""python -m tests.abuse.fuzz --minutes 5 --seed 0: bytes changed at random in good files, and graphs that are changed at random.

Every stage reads files whose bytes were changed: no traceback, no hang, nothing changed outside --out. Surgery reads changed graphs:
what it takes, onnxruntime must load, and so must it the portable graph that surgery wrote. Prints the counts; exit status 1 where a
promise was broken, and then what broke it lies in --keep.
"""

import argparse
import gzip
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from suture.core.onnx_checks import DATA
from tests.abuse.case import FINISHED, NO_TRACE, Case, broken_promises, contents
from tests.abuse.flips import FLIPPED, changed
from tests.abuse.graphs import small
from tests.abuse.mutants import mutated
from tests.abuse.server import Server
from tests.abuse.sources import Sources

PROMISE = "no traceback, no hang, no file changed outside --out, no invalid graph taken or written"
MUTANTS = 2 / 3  # of all that is drawn
STORED = Path(__file__).parents[1] / "graphs"
LARGE = 1 << 19  # bytes of a stored graph, of which none is changed: each would take seconds
ANYBODYS = {"", "ai.onnx", "com.microsoft"}  # domains whose operators onnxruntime knows; a plugin's may be any


class Fuzz:
    def __init__(self, folder: Path, seed: int, keep: Path):
        self.folder, self.draw, self.keep = folder, random.Random(seed), keep
        self.counts: Counter[str] = Counter()
        self.server = Server()
        self.sources = Sources(folder, self.server)
        inputs = self.sources.good("surgery")
        self.places = [(stage, name) for stage, names in FLIPPED.items() for name in names]
        decoders = [onnx.load(inputs / name / "model.onnx") for name in ("graphs", "static", "pair")]
        self.graphs = [small(), *decoders, *stored()]
        onnxruntime.set_default_logger_severity(4)

    def flip(self) -> None:
        stage, name = self.draw.choice(self.places)
        self.counts["files of changed bytes"] += 1

        def damage(work: Path) -> None:
            (work / name).write_bytes(changed((work / name).read_bytes(), self.draw))

        fault = NO_TRACE if stage == "export" else None
        case = Case(0, stage, name, PROMISE, damage, expected=(0, 1, 2), seconds=120, fault=fault, more=FINISHED.get(stage, ()),
                    finished=name.startswith("out/"))  # fmt: skip
        work, _ = self.run(case)
        shutil.rmtree(work, ignore_errors=True)

    def mutant(self) -> None:
        model = mutated(self.draw.choice(self.graphs), self.draw)
        self.counts["changed graphs"] += 1
        options = (
            "{work}/graphs/model.onnx",
            "--out",
            "{work}/out",
            "--no-verify",
        )  # what it writes must be valid before any proof

        def damage(work: Path) -> None:
            (work / "graphs" / "model.onnx").write_bytes(model.SerializeToString())

        work, status = self.run(Case(0, "surgery", "mutant", PROMISE, damage, expected=(0, 1, 2), arguments=options))
        if status in (0, 1):
            self.counts["of them taken"] += 1
            for what, name in (("taken", "graphs/model.onnx"), ("written", "out/model.onnx")):
                if (work / name).exists() and (refused := _refusal(work / name)):
                    self.counts[f"graphs {what}, which onnxruntime refuses"] += 1
                    self.broken(work, [f"{what}, and onnxruntime refuses it: {refused}"])
        shutil.rmtree(work, ignore_errors=True)

    def run(self, case: Case) -> tuple[Path, int | None]:
        work = self.folder / f"case{self.counts.total()}" / "work"
        shutil.copytree(self.sources.of(case), work, symlinks=True)
        case.damage(work)
        damaged, before = work.parent / "damaged", contents(work)
        shutil.copytree(work, damaged, symlinks=True)
        result = self.server.run(case, work)
        self.counts[f"exit status {result.status}"] += 1
        found = [
            each for each in broken_promises(case, result, before, contents(work)) if "lines on standard error" not in each
        ]
        if found:
            self.broken(damaged, [f"{case.stage}, {case.name}: {'; '.join(found)}", result.err[-500:]])
        shutil.rmtree(damaged)
        return work, result.status

    def broken(self, folder: Path, lines: list[str]) -> None:
        self.counts["promises broken"] += 1
        kept = self.keep / str(self.counts["promises broken"])
        shutil.copytree(folder, kept, symlinks=True)
        print(f"{kept}:", *lines, sep="\n    ", flush=True)


def stored() -> Iterator[onnx.ModelProto]:
    """The graphs of the tests, with weights where they are stored without."""
    for path in sorted(STORED.rglob("*.onnx*")):
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        if len(content) > LARGE:
            continue
        model = onnx.ModelProto.FromString(content)
        for tensor in model.graph.initializer:
            left_out = all(tensor.dims) and not any(len(getattr(tensor, name)) for name in ("raw_data", *DATA))
            if left_out or tensor.data_location == TensorProto.EXTERNAL:
                values = np.ones(list(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type))
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        yield model


def _refusal(path: Path) -> str | None:
    """Why onnxruntime does not load the graph, or None where it does, lacks a kernel, or cannot know an operator."""
    if {node.domain for node in onnx.load(path, load_external_data=False).graph.node} - ANYBODYS:
        return None
    try:
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        return None if "NOT_IMPLEMENTED" in str(error) else str(error)[:300]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="a folder for what broke a promise (out/fuzz)")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder), options.seed, Path(tempfile.mkdtemp(dir=options.keep)))
        ends = time.monotonic() + 60 * options.minutes
        while time.monotonic() < ends:
            fuzz.mutant() if fuzz.draw.random() < MUTANTS else fuzz.flip()
        fuzz.server.close()
    for what, count in sorted(fuzz.counts.items()):
        print(f"{count:7,} {what}")
    return int(fuzz.counts["promises broken"] > 0)


if __name__ == "__main__":
    sys.exit(main())
