"""python -m benchmarks.draws [--draws N] [--seed S] [--only INDEX]

Random graphs of every operator that a pass names, with attributes and inputs as onnx.defs has them: as drawn and after surgery
in onnxruntime, and as TensorRT's network. Needs no GPU. What differs without a word is printed, graph and all; exit status 1.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import onnx

from benchmarks.draws import draw
from benchmarks.draws.judge import FAULTS, INVALID, judge
from suture.core.command import FOUND_DIFFERENCE
from suture.core.network.parse import ParserProcess
from suture.core.progress import counted


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draws", description=__doc__.split("\n", 2)[2].strip())
    parser.add_argument("--draws", type=int, default=10_000, metavar="N", help="valid ones (default: 10,000, half an hour)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default: 0)")
    parser.add_argument("--only", type=int, metavar="INDEX", help="one of them, shown with what became of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    options = parser.parse_args()
    with ParserProcess() as trt:
        if options.only is not None:
            canvas = draw(options.seed, options.only)
            print(onnx.printer.to_text(canvas.model()), judge(canvas, trt), sep="\n")
            return 0
        found = list(counted("draws", "drawn", _valid(trt, options.seed, options.draws), options.draws))
    counts = Counter(verdict.result for verdict, _ in found)
    rewritten = sum(bool(verdict.rewritten) for verdict, _ in found) / max(len(found), 1)
    faults = [(verdict, index) for verdict, index in found if verdict.result in FAULTS]
    for result, number in counts.most_common():
        print(f"{number:7,}  {result}")
    print(f"{rewritten:7.0%}  reach a rewrite (seed {options.seed})")
    for verdict, index in faults:
        print(f"\n{index}: {verdict.result}: {verdict.why}; rewritten by {', '.join(verdict.rewritten)}")
        print(onnx.printer.to_text(draw(options.seed, index).model()))
    if options.json:
        record = {"draws": len(found), "seed": options.seed, "results": dict(counts), "rewritten": round(rewritten, 3)}
        record["passes"] = dict(Counter(name for verdict, _ in found for name in verdict.rewritten).most_common())
        record["refused"] = dict(Counter(verdict.why for verdict, _ in found if verdict.result.startswith("refused by s")))
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return FOUND_DIFFERENCE if faults else 0


def _valid(trt: ParserProcess, seed: int, number: int):
    """Verdicts with the draw's index, of those that onnxruntime runs as they are drawn."""
    index = done = 0
    while done < number:
        verdict = judge(draw(seed, index), trt)
        if verdict.result != INVALID:
            done += 1
            yield verdict, index
        index += 1


if __name__ == "__main__":
    sys.exit(main())
