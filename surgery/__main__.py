"""python -m surgery MODEL.onnx --out DIR [--cache static|growing] [--capacity 2048] [--logits all|last] [--skip PASS]"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from contracts.command import Parser, run
from contracts.errors import UserError
from contracts.manifest import Stage
from contracts.weights import load_graph, place_weights
from surgery import files
from surgery.lowering import LOWERING
from surgery.passes import PORTABLE, interface, last_token_logits, node_names, static_cache
from surgery.runner import name_of, operate

PASSES = [name_of(a_pass) for a_pass in (*PORTABLE, static_cache, last_token_logits, interface, node_names, *LOWERING)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", choices=("static", "growing"), default="static", help="the KV cache's form (%(default)s)")
    parser.add_argument("--capacity", type=int, default=2048, help="slots of a static cache (%(default)s)")
    parser.add_argument("--logits", choices=("all", "last"), default="all", help="of every token or the last (%(default)s)")
    parser.add_argument("--skip", metavar="PASS", action="append", default=[], help="leave out a pass; may be repeated")
    parser.add_argument("--past", metavar="REGEX", help="which inputs are caches, where their names do not say so")


def main() -> None:
    parser = Parser(prog="surgery", description="Fuse a language model's graph and make its KV cache static.")
    parser.add_argument("model", metavar="MODEL.onnx", type=Path)
    add_options(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    surgery(parser.parse_args())


def surgery(options: argparse.Namespace) -> None:
    _check(options)
    stage = Stage(
        "surgery",
        options.out,
        inputs=[options.model],
        options={name: getattr(options, name) for name in ("cache", "capacity", "logits", "skip", "past")},
    )
    if stage.up_to_date() and not options.force:
        print(f"surgery: up to date ({options.out})")
        return
    with stage.writing() as partial:
        source = load_graph(options.model)
        graph = files.read(options.model, options.past)
        portable, lowered, report = operate(graph, options.cache, options.capacity, options.logits, options.skip)
        stage.extra["weights_root"] = place_weights(source, options.model, partial, options.out)
        files.write(portable, partial / "model.onnx")
        files.write(lowered, partial / "model.trt.onnx")
        (partial / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n")
    Console().print(report.table())
    for each in report.unfused:
        print(f"not fused: {each['op']} at {each['node']} ({each['reason']})")
    nodes = report.nodes
    print(f"surgery: {nodes['before']} → {nodes['portable']} nodes (lowered {nodes['lowered']}) → {options.out}/model.onnx")


def _check(options: argparse.Namespace) -> None:
    if options.capacity < 1:
        raise UserError("--capacity", f"{options.capacity} slots hold nothing", "give at least 1")
    for name in options.skip:
        if name not in PASSES:
            raise UserError(f"--skip {name}", "no such pass", f"choose from {', '.join(PASSES)}")


if __name__ == "__main__":
    run("surgery", main)
