"""The ranks of a divided graph, a process each, beside the whole graph in one: tokens, logits, and where a step's time goes.

    python -m surgery ranks SURGERY --tensor-parallel 2 --out RANKS
    python -m benchmarks.tensor_parallel --whole SURGERY --ranks RANKS --device cuda --out results.json

Both decode greedily from the same prompt in onnxruntime; on a CPU the ranks add up through gloo, on GPUs through NCCL. A token may
differ from the whole graph's where its two best logits are closer than TIE of the largest; the step after such a token is not
compared. What the collectives take is measured apart, on tensors of the same sizes.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing

from suture.core.command import DONE, FOUND_DIFFERENCE, CommandParser, run
from suture.core.signature import find_signature
from suture.core.weights import load_graph
from suture.runtime.decoders import Decoder, StaticDecoder
from suture.runtime.graphs import open_to_generate
from suture.runtime.ranks import open_rank

TIE = 1e-2  # of the largest logit
CLOSE = 2e-3  # of the largest logit: what the logits of both may lie apart
SEED = 0


@dataclass
class Decoded:
    """Of greedy decoding: `tokens` [steps, B], the first and last steps' logits [B, vocab], the median seconds of a step."""

    tokens: list[list[int]]
    logits: list[np.ndarray]
    prompt_seconds: float
    step_seconds: float


def decode(decoder: Decoder, prompt: np.ndarray, steps: int, forced: list[list[int]] | None = None) -> Decoded:
    """`forced`: the tokens that are read in place of the decoder's own, so that two decoders stay comparable."""
    rows = len(prompt)
    alpha, ones = np.ones(rows, np.float32), np.ones(rows, np.int64)
    started = time.perf_counter()
    logits = decoder.step(prompt, np.full(rows, prompt.shape[1]), alpha)[:, -1].copy()
    prompt_seconds = time.perf_counter() - started
    tokens, kept, seconds = [logits.argmax(-1).tolist()], [logits], []
    for step in range(steps):
        given = forced[step] if forced is not None else tokens[-1]
        started = time.perf_counter()
        logits = decoder.step(np.array(given)[:, None], ones, alpha)[:, -1].copy()
        seconds.append(time.perf_counter() - started)
        tokens.append(logits.argmax(-1).tolist())
        kept.append(logits)
    return Decoded(tokens, kept, prompt_seconds, float(np.median(seconds[len(seconds) // 4 :])))


def one_rank(rank: int, ranks: int, port: int, options: dict, results: torch.multiprocessing.Queue) -> None:
    """What a process does. Every rank gets the same logits; the first one's are sent back."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = options["device"]
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=ranks)
    model = open_rank(Path(options["ranks"]) / f"rank{rank}.onnx", torch.distributed.all_reduce, device)
    decoder = model.decoder(len(options["prompt"]))
    found = decode(decoder, options["prompt"], options["steps"], options["forced"])
    memory = list(decoder.session.steps.values())[-1].memory
    collective = _collective_seconds([torch.zeros_like(memory[name]) for part in model.parts for name in part.sums])
    if rank == 0:
        results.put((found, collective))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _collective_seconds(sums: list[torch.Tensor]) -> float:
    """Of all sums of a step, one after the other."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for values in sums:
            torch.distributed.all_reduce(values)
        if sums[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def of_ranks(options: dict, ranks: int) -> tuple[Decoded, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = torch.multiprocessing.spawn(one_rank, (ranks, port, options, results), ranks, join=False)
    found = results.get(timeout=options["patience"])
    processes.join()
    return found


def compared(whole: Decoded, ranks: Decoded) -> dict:
    """`agree`: steps whose tokens are the same or tied; `error`: the largest between logits, of the largest logit."""
    errors, agree, ties = [], 0, 0
    for expected, found in zip(whole.logits, ranks.logits):
        largest = np.abs(expected).max()
        errors.append(float(np.abs(found.astype(np.float64) - expected).max() / largest))
        best = np.sort(expected, axis=-1)[:, -2:]
        tied = (best[:, 1] - best[:, 0]) < TIE * largest
        same = expected.argmax(-1) == found.argmax(-1)
        agree += bool((same | tied).all())
        ties += bool((~same & tied).any())
    return {"steps": len(errors), "agree": agree, "ties": ties, "error": max(errors)}


def main(line: list[str] | None = None) -> int:
    parser = CommandParser(prog="benchmarks.tensor_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--whole", metavar="DIR", type=Path, required=True, help="what surgery wrote")
    parser.add_argument("--ranks", metavar="DIR", type=Path, required=True, help="what surgery ranks wrote of it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", metavar="FILE.json", type=Path)
    given = parser.parse_args(line)
    report = json.loads((given.ranks / "report.json").read_text(encoding="utf-8"))
    graph = load_graph(given.whole / "model.onnx")
    signature = find_signature(graph, given.whole)
    prompt = np.random.default_rng(SEED).integers(0, signature.vocabulary or 256, (given.rows, given.length))
    model = open_to_generate(given.whole / "model.onnx", given.device)
    whole = decode(StaticDecoder(model.decoder(given.rows).session, model.signature, noise=False), prompt, given.steps)
    del model
    options = {"ranks": str(given.ranks), "device": given.device, "prompt": prompt, "steps": given.steps, "forced": whole.tokens,
               "patience": 1200}  # fmt: skip
    ranks, collective = of_ranks(options, report["ranks"])
    found = {
        "ranks": report["ranks"], "rows": given.rows, "length": given.length, **compared(whole, ranks),
        "whole": {"prompt_ms": whole.prompt_seconds * 1e3, "step_ms": whole.step_seconds * 1e3},
        "divided": {"prompt_ms": ranks.prompt_seconds * 1e3, "step_ms": ranks.step_seconds * 1e3},
        "collectives_ms": collective * 1e3,
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return DONE if found["agree"] == found["steps"] and found["error"] <= CLOSE else FOUND_DIFFERENCE


if __name__ == "__main__":
    run("benchmarks.tensor_parallel", main)
