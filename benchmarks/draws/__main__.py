"""python -m benchmarks.draws [--draws N] [--seed S] [--json FILE] [--only INDEX]

Random graphs of every operator that a pass names, with attributes and inputs as onnx.defs has them: as drawn and after surgery
in onnxruntime, and as TensorRT's network. Needs no GPU. What differs without a word is printed, graph and all; exit status 1.
--json writes the counts as they grow; a run that was stopped goes on from the same file.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import onnx

from benchmarks.draws import draw
from benchmarks.draws.judge import FAULTS, INVALID, DrawVerdict, judge
from suture.core.command import FOUND_DIFFERENCE
from suture.core.network.parse import ParserProcess
from suture.core.progress import counted

OFTEN = 50  # draws between two writings of the counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draws", description=__doc__.split("\n", 2)[2].strip())
    parser.add_argument("--draws", type=int, default=10_000, metavar="N", help="valid ones (default: 10,000, ten minutes)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default: 0)")
    parser.add_argument("--only", type=int, metavar="INDEX", help="one of them, shown with what became of it")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the counts there; if it is there, of this seed, go on from it"
    )
    options = parser.parse_args()
    counts = _begun(options.json, options.seed)
    with ParserProcess() as trt:
        if options.only is not None:
            canvas = draw(options.seed, options.only)
            print(onnx.printer.to_text(canvas.model()), judge(canvas, trt), sep="\n")
            return 0
        left = options.draws - counts["draws"]
        for number, (verdict, index) in enumerate(counted("draws", "drawn", _valid(trt, counts, left), left), 1):
            _count(counts, verdict, index)
            if options.json and (number % OFTEN == 0 or number == left):
                options.json.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    for result, count in sorted(counts["results"].items(), key=lambda each: -each[1]):
        print(f"{count:7,}  {result}")
    print(f"{counts['rewritten'] / max(counts['draws'], 1):7.0%}  reach a rewrite (seed {options.seed})")
    for fault in counts["faults"]:
        print(f"\n{fault['index']}: {fault['result']}: {fault['why']}; rewritten by {', '.join(fault['by'])}")
        print(onnx.printer.to_text(draw(options.seed, fault["index"]).model()))
    return FOUND_DIFFERENCE if counts["faults"] else 0


def _begun(path: Path | None, seed: int) -> dict:
    if path is not None and path.exists():
        counts = json.loads(path.read_text(encoding="utf-8"))
        if counts["seed"] == seed:
            return counts
    return {"seed": seed, "next": 0, "draws": 0, "rewritten": 0, "results": {}, "passes": {}, "refused": {}, "faults": []}


def _count(counts: dict, verdict: DrawVerdict, index: int) -> None:
    counts["next"] = index + 1
    counts["draws"] += 1
    counts["rewritten"] += bool(verdict.rewritten)
    refused = [verdict.why] if verdict.result.startswith("refused by s") else []
    for part, names in (("results", [verdict.result]), ("passes", verdict.rewritten), ("refused", refused)):
        counts[part] = dict((Counter(counts[part]) + Counter(names)).most_common())
    if verdict.result in FAULTS:
        counts["faults"].append({"index": index, "result": verdict.result, "why": verdict.why, "by": list(verdict.rewritten)})


def _valid(trt: ParserProcess, counts: dict, number: int):
    """Verdicts with the draw's index, of those that onnxruntime runs as they are drawn."""
    index, done = counts["next"], 0
    while done < number:
        verdict = judge(draw(counts["seed"], index), trt)
        if verdict.result != INVALID:
            done += 1
            yield verdict, index
        index += 1


if __name__ == "__main__":
    sys.exit(main())
