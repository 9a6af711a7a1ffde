"""The ranks of a divided graph, a process and a GPU each, beside the whole graph on one GPU and beside a replica on each.

    python -m surgery ranks SURGERY --tensor-parallel 2 --out RANKS
    python -m benchmarks.tensor_parallel --whole SURGERY --ranks RANKS --device cuda --out results.json

The whole graph decodes greedily, and the ranks read its tokens: theirs may differ where its two best logits are closer than TIE of
the largest. `--exact CHECKPOINT`, of the original Qwen, holds the whole graph, the ranks, and the joint graph against float32. On
a CPU the ranks add up through gloo, on GPUs through NCCL.

Then steps are timed (`--cells`): on one GPU, on all ranks, whose steps are captured as CUDA graphs with their collectives and
then queued without one, and on replicas at the same time. With fewer GPUs than ranks, neither ranks nor replicas run. Ends with 1
where tokens or logits differ.
"""

import json
import os
import queue
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing

from benchmarks.gpu_decode import Cell
from benchmarks.gpu_kernels import profile
from benchmarks.gpu_limits import free_memory, median_seconds
from benchmarks.gpu_onnx import OnnxRun
from benchmarks.gpu_torch import load, prompt
from suture.core.command import DONE, FOUND_DIFFERENCE, CommandParser, run
from suture.core.signature import Signature, find_signature
from suture.core.weights import load_graph
from suture.models.architectures import open_checkpoint
from suture.runtime.decoders import Decoder, StaticDecoder
from suture.runtime.graphs import OWN_OPERATORS, open_to_generate
from suture.runtime.ranks import RankModel, RankSession, open_rank

TIE = 1e-2  # of the largest logit
CLOSE = 2e-3  # of the largest logit: what the logits of both may lie apart,
ALLOWED = 2.0  # or, where the ranks are held against float32: times as far from it as the whole graph is in its own type
SEED = 0
PATIENCE = 500  # seconds that the processes of one measurement have
CELLS = ("decode 1x512", "decode 16x512", "prompt 512")


@dataclass(frozen=True)
class Options:
    """What every process is given."""

    whole: Path
    ranks: Path
    device: str
    prompt: np.ndarray
    steps: int
    cells: tuple[str, ...]
    work: Path
    captured: bool = True
    exact: Path | None = None

    @property
    def backend(self) -> str:
        return "nccl" if self.device == "cuda" else "gloo"


def decode(decoder: Decoder, prompt: np.ndarray, steps: int, forced: np.ndarray | None = None) -> np.ndarray:
    """Logits [1 + steps, B, vocab] of the prompt's last token and of greedy steps. `forced` [1 + steps, B]: tokens that are read in
    place of the decoder's own, so that two decoders stay comparable."""
    rows = len(prompt)
    alpha, ones = np.ones(rows, np.float32), np.ones(rows, np.int64)
    kept = [decoder.step(prompt, np.full(rows, prompt.shape[1]), alpha)[:, -1].copy()]
    for step in range(steps):
        given = kept[-1].argmax(-1) if forced is None else forced[step]
        kept.append(decoder.step(given[:, None], ones, alpha)[:, -1].copy())
    return np.stack(kept)


def compared(whole: np.ndarray, ranks: np.ndarray) -> dict:
    """`agree`: steps whose tokens are the same or tied. Errors are of a step's largest logit."""
    largest = np.abs(whole).max(axis=-1)
    errors = (np.abs(ranks.astype(np.float64) - whole).max(axis=-1) / largest).max(axis=-1)
    best = np.sort(whole, axis=-1)[..., -2:]
    tied = (best[..., 1] - best[..., 0]) < TIE * largest
    same = whole.argmax(-1) == ranks.argmax(-1)
    return {
        "steps": len(whole), "agree": int((same | tied).all(axis=-1).sum()), "ties": int((~same & tied).any(axis=-1).sum()),
        "error": float(errors.max()), "median_error": float(np.median(errors)),
    }  # fmt: skip


def on_one_gpu(rank: int, options: Options) -> dict:
    """The whole graph: its tokens and logits go to files, its times are returned."""
    model = open_to_generate(options.whole / "model.onnx", options.device)
    decoder = StaticDecoder(model.decoder(len(options.prompt)).session, model.signature, noise=False)
    np.save(options.work / "logits.npy", decode(decoder, options.prompt, options.steps).astype(np.float32))
    del model, decoder
    free_memory(options.device)
    return {name: _whole_times(options.whole / name, options) for name in _forms(options)}


def _forms(options: Options) -> list[str]:
    return ["model.onnx", *([OWN_OPERATORS] if (options.whole / OWN_OPERATORS).exists() and options.device == "cuda" else [])]


def _whole_times(model: Path, options: Options) -> dict[str, float]:
    """Milliseconds a cell."""
    runner, times = OnnxRun(model, options.device, options.device == "cuda", None), {}
    for cell in map(Cell.parse, options.cells):
        tokens = torch.ones((cell.batch, 1 if cell.kind == "decode" else cell.length), dtype=torch.int64, device=options.device)
        step = runner.decode(tokens, cell.length) if cell.kind == "decode" else runner.prompt(tokens)
        times[str(cell)] = 1e3 * median_seconds(step, options.device)
    runner.close()
    free_memory(options.device)
    return times


def in_float32(rank: int, options: Options) -> dict:
    """The same weights in float32, in torch: how far the whole graph is from that, and the joint graph, which adds up all ranks on
    one GPU. The logits go to a file."""
    whole = np.load(options.work / "logits.npy")
    read = np.concatenate([options.prompt, whole[:-1].argmax(-1).T], axis=1)
    network = load(open_checkpoint(options.exact), torch.float32, options.device)
    logits, _ = prompt(network, torch.from_numpy(read).to(options.device))
    exact = logits[:, options.prompt.shape[1] - 1 :].transpose(0, 1).cpu().numpy()
    np.save(options.work / "exact.npy", exact)
    del network, logits
    free_memory(options.device)
    model = open_to_generate(options.ranks / "joint.onnx", options.device)
    decoder = StaticDecoder(model.decoder(len(options.prompt)).session, model.signature, noise=False)
    joint = decode(decoder, options.prompt, options.steps, whole.argmax(-1))
    return {"whole": compared(exact, whole), "joint": compared(exact, joint), "joint beside whole": compared(whole, joint)}


def on_a_rank(rank: int, options: Options) -> dict:
    """Every rank gets the same logits; the first one's are compared, and its times returned."""
    widths = tuple(
        {1, options.prompt.shape[1], *(cell.length for cell in map(Cell.parse, options.cells) if cell.kind == "prompt")}
    )
    model = open_rank(
        options.ranks / f"rank{rank}.onnx", torch.distributed.all_reduce, options.device, widths, options.captured
    )
    whole = np.load(options.work / "logits.npy")
    decoder = model.decoder(len(options.prompt))
    logits = decode(decoder, options.prompt, options.steps, whole.argmax(-1))
    found = compared(whole, logits)
    if options.exact:
        found["beside float32"] = compared(np.load(options.work / "exact.npy"), logits)
    session = decoder.session
    sums = [session.steps[1, 0, len(options.prompt)].memory[name] for part in model.parts for name in part.sums]
    found |= {"collectives": len(sums), "collectives_alone_ms": 1e3 * median_seconds(_adding(sums, options), options.device)}
    found["captured"] = all(step.graph is not None for step in session.steps.values())
    del decoder, session
    free_memory(options.device)
    found["ms"], found["kernels"] = {}, {}
    for batch in sorted({cell.batch for cell in map(Cell.parse, options.cells)}):
        session = RankSession(model, batch)
        for cell in (each for each in map(Cell.parse, options.cells) if each.batch == batch):
            step = _rank_step(session, model, cell, options.device)
            found["ms"][str(cell)] = 1e3 * median_seconds(step, options.device)
            found["kernels"][str(cell)] = _by_kind(profile(step, options.device))
        del session
        free_memory(options.device)
    return found


def _rank_step(session: RankSession, model: RankModel, cell: Cell, device: str) -> Callable[[], object]:
    names: Signature = model.signature
    width, context = (1, cell.length) if cell.kind == "decode" else (cell.length, 0)
    values = {
        names.tokens: torch.ones((cell.batch, width), dtype=torch.int64, device=device),
        names.positions: (context + torch.arange(width, device=device)).expand(cell.batch, width),
        names.write_indices: torch.full((cell.batch,), context, device=device),
        names.sequence_lengths: torch.full((cell.batch,), width, device=device),
        names.ntk_alpha: torch.ones(cell.batch, device=device),
    }
    feeds = {name: value for name, value in values.items() if name is not None}
    return lambda: session.advance(feeds)


def _adding(sums: list[torch.Tensor], options: Options) -> Callable[[], object]:
    """All sums of a decoding step one after the other, and nothing between; on a GPU as a CUDA graph where steps are."""

    def add() -> None:
        for values in sums:
            torch.distributed.all_reduce(values)

    if not (options.captured and options.device == "cuda"):
        return add
    add()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        add()
    return graph.replay


def _by_kind(kernels: list[dict]) -> dict[str, float]:
    """Microseconds a step of each kind of kernel. A collective's includes what it waits for the other ranks."""
    kinds: dict[str, float] = {}
    for kernel in kernels:
        kinds[kernel["kind"]] = round(kinds.get(kernel["kind"], 0.0) + kernel["us"], 1)
    return dict(sorted(kinds.items(), key=lambda each: -each[1]))


def as_replica(rank: int, options: Options) -> dict:
    """The whole graph, while others compute it on theirs."""
    torch.distributed.barrier()
    return _whole_times(options.whole / _forms(options)[-1], options)


def measured(job: Callable[[int, Options], dict], count: int, options: Options) -> dict:
    """What the first of `count` processes returns. Raises RuntimeError with the first traceback where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").Queue()
    processes = torch.multiprocessing.spawn(_process, (job, count, port, options, results), count, join=False)
    found: dict = {}
    try:
        ends = time.monotonic() + PATIENCE
        while len(found) < count:
            try:
                rank, outcome = results.get(timeout=1)
            except queue.Empty:
                codes = [process.exitcode for process in processes.processes]
                if any(codes) or time.monotonic() > ends:
                    raise RuntimeError(f"after {PATIENCE} s, or as one ended: exit codes {codes}") from None
                continue
            if isinstance(outcome, str):
                raise RuntimeError(outcome)
            found[rank] = outcome
    finally:
        for process in processes.processes:
            process.join(10 if len(found) == count else 0)
            process.kill()
    return found[0]


def gpu_of(rank: int) -> str:
    """The one GPU that a rank's process sees: onnxruntime computes on the first that it sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[rank] if visible else str(rank)


def _process(rank: int, job: Callable, count: int, port: int, options: Options, results: torch.multiprocessing.Queue) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        visible.split(",")[rank] if visible else str(rank)
    )  # onnxruntime's first GPU is the rank's
    try:
        place = torch.device("cuda", 0) if options.device == "cuda" else None
        torch.distributed.init_process_group(options.backend, rank=rank, world_size=count, device_id=place)
        results.put((rank, job(rank, options)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except Exception:  # said by the parent, which ends the others
        results.put((rank, traceback.format_exc()))


def main(line: list[str] | None = None) -> int:
    parser = CommandParser(prog="benchmarks.tensor_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--whole", metavar="DIR", type=Path, required=True, help="what surgery wrote")
    parser.add_argument("--ranks", metavar="DIR", type=Path, required=True, help="what surgery ranks wrote of it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=1, help="of the tokens that are compared")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="compared behind it (%(default)s)")
    parser.add_argument("--cells", nargs="*", metavar="CELL", default=CELLS, help="timed (default: %(default)s)")
    parser.add_argument(
        "--exact", metavar="CHECKPOINT", type=Path, help="of the whole graph's weights: computed in float32, too"
    )
    parser.add_argument("--out", metavar="FILE.json", type=Path)
    given = parser.parse_args(line)
    count = json.loads((given.ranks / "report.json").read_text(encoding="utf-8"))["ranks"]
    signature = find_signature(load_graph(given.whole / "model.onnx"), given.whole)
    prompt = np.random.default_rng(SEED).integers(0, signature.vocabulary or 256, (given.rows, given.length))
    with tempfile.TemporaryDirectory() as work:
        options = Options(
            given.whole, given.ranks, given.device, prompt, given.steps, tuple(given.cells), Path(work), exact=given.exact
        )
        found = {"ranks": count, "rows": given.rows, "length": given.length, "one": measured(on_one_gpu, 1, options)}
        if given.exact:
            found["float32"] = measured(in_float32, 1, options)
        _say(found, given.out)
        enough = given.device == "cpu" or torch.cuda.device_count() >= count
        for captured in ((True, False) if given.device == "cuda" else (False,)) if enough else ():
            name = "divided" if captured or given.device == "cpu" else "divided, not captured"
            try:
                found[name] = measured(on_a_rank, count, Options(**{**vars(options), "captured": captured}))
            except RuntimeError as error:
                found[name] = {"failed": str(error)}
            _say(found, given.out)
        if given.device == "cuda" and enough:
            found["replicas"] = measured(as_replica, count, options)
        _say(found, given.out)
    print(json.dumps(found, indent=2))
    divided = [each for name, each in found.items() if name.startswith("divided")]
    return DONE if all(_right(each, found.get("float32"), given.steps) for each in divided) else FOUND_DIFFERENCE


def _right(divided: dict, exact: dict | None, steps: int) -> bool:
    if "failed" in divided or divided["agree"] <= steps:
        return False
    return divided["error"] <= CLOSE or bool(exact and divided["beside float32"]["error"] <= ALLOWED * exact["whole"]["error"])


def _say(found: dict, out: Path | None) -> None:
    """Kept after each measurement: what was measured stays, whatever fails later."""
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run("benchmarks.tensor_parallel", main)
