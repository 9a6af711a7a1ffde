"""How fast a checkpoint decodes, side by side in one process: transformers, eager and compiled, and our graphs.

    python -m suture.models.random_checkpoint --preset qwen-7b --dtype float16 --out CHECKPOINT
    python -m export --checkpoint CHECKPOINT --weights reference --out GRAPHS/export
    python -m surgery GRAPHS/export/model.onnx --capacity 8192 --skip swish --onnxruntime --out GRAPHS/surgery
    python -m surgery GRAPHS/export/model.onnx --capacity 8192 --onnxruntime --out GRAPHS/int4 --quantize int4  # and int8
    python -m benchmarks.gpu_decode --checkpoint CHECKPOINT --graphs GRAPHS --out results.json

The device's bandwidth and matrix throughput are measured in the same run. Before anything is timed its logits are checked
against the same weights in float32: they may be at most twice as far from it as transformers' eager ones in the same type.
Of quantised weights only that they are no further from it than rounding explains; what that does to text, random weights
cannot say.
"""

import argparse
import json
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime
import torch
import transformers
from torch import Tensor

from benchmarks import gpu_limits
from benchmarks.gpu_kernels import profile, table
from benchmarks.gpu_limits import Clock, GpuLimits, free_memory, median_seconds, relative_norm
from benchmarks.gpu_onnx import OnnxRun
from benchmarks.gpu_torch import Caches, TorchRun, load, prompt
from suture.core.command import FOUND_DIFFERENCE, CommandParser, run
from suture.models.architectures import open_checkpoint
from suture.models.checkpoint import Checkpoint
from suture.models.families.qwen import QwenConfig
from suture.runtime.graphs import OWN_OPERATORS

RUNS = (
    "surgered-cuda-graph",
    "surgered-onnxruntime-cuda-graph",
    "surgered",
    "exported",
    "eager",
    "compiled-reduce-overhead",
    "compiled-max-autotune",
)
ROUNDED = {"int8": (1 + 2 / 128, 0.05), "int4": (0.5 + 2 / 128, 0.5)}  # bytes a weight; error allowed
QUANTISED = {f"{format}{form}-cuda-graph": known for format, known in ROUNDED.items() for form in ("", "-onnxruntime")}
FLOATS, RUNS = RUNS, (*RUNS, *QUANTISED)
HEAD_BYTES = 1 + 2 / 128  # a weight of a quantised graph's head
ONE_OF_ALL = "decode 1x512"  # the cell that every call measures, to compare calls by
CELLS = {
    **{
        name: [f"decode {b}x{c}" for b in (1, 4, 16) for c in (512, 2048, 8000)] + ["prompt 512", "prompt 2048"]
        for name in RUNS[:2]
    },
    **{name: ["decode 1x512", "prompt 512", "decode 16x512", "decode 1x8000"] for name in RUNS[2:]},
}
TOLERANCE = 2.0  # times the error of eager transformers
ROUNDING = 1e-5  # what float32 against float32 may differ by


@dataclass(frozen=True)
class Cell:
    """One measurement: a step that decodes a token for `batch` sequences of `length`, or a prompt of `length`."""

    kind: str
    batch: int
    length: int

    @classmethod
    def parse(cls, text: str) -> "Cell":
        kind, _, size = text.partition(" ")
        batch, _, length = size.rpartition("x")
        return cls(kind, int(batch or 1), int(length))

    def __str__(self) -> str:
        return f"decode {self.batch}x{self.length}" if self.kind == "decode" else f"prompt {self.length}"


@dataclass
class CellResult:
    run: str
    cell: str
    ms: float | None = None
    tokens_per_s: float | None = None
    gb_per_s: float | None = None
    percent_of_limit: float | None = None
    error: float | None = None
    eager_error: float | None = None
    note: str = ""


@dataclass
class CellInputs:
    """What a cell reads, and what comes out in float32 where it was computed."""

    tokens: Tensor
    caches: Caches | int
    exact: Tensor | None = None
    eager_error: float | None = None


class Benchmark:
    def __init__(self, options: argparse.Namespace):
        self.options, self.device, self.last = options, options.device, options.logits == "last"
        self.checkpoint: Checkpoint = open_checkpoint(options.checkpoint)
        self.config = QwenConfig.read(self.checkpoint.config, options.checkpoint)
        self.dtype = getattr(torch, self.checkpoint.dtype)
        self.clock = Clock()
        self.results: list[CellResult] = []
        self.kernels: list[dict] = []
        self.cases: dict[Cell, CellInputs] = {}
        self.seconds: dict[str, float] = {}
        size, width = (8_000_000_000, 8192) if self.device == "cuda" else (40_000_000, 256)
        self.limits: GpuLimits = gpu_limits.measure(self.device, self.dtype, size, width)
        print(self.limits, flush=True)
        self.eager = load(self.checkpoint, self.dtype, self.device)
        self.clock.say("weights loaded")

    def main(self) -> int:
        plan = {name: [Cell.parse(text) for text in self._cells(name)] for name in self.options.runs}
        self._prepare({cell for cells in plan.values() for cell in cells})
        for name, cells in plan.items():
            self._run(name, cells)
        print(self._summary())
        failed = [result for result in self.results if result.note.startswith(("wrong", "failed"))]
        return FOUND_DIFFERENCE if failed else 0

    def _cells(self, name: str) -> list[str]:
        cells = self.options.cells or CELLS[name]
        return list(dict.fromkeys([self.options.common, *cells]))

    def _prepare(self, cells: set[Cell]) -> None:
        """Tokens and caches of each cell, and its exact logits: by the same weights in float32, from the same caches."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            exact = None
            for cell in sorted(cells, key=str):
                steps = 1 if cell.kind == "decode" else cell.length
                tokens = torch.randint(self.config.vocab, (cell.batch, cell.length + 1), generator=generator).to(self.device)
                if cell.kind == "prompt":
                    case = CellInputs(tokens[:, :steps], 0)
                elif cell.batch * cell.length <= self.options.checked:
                    case = CellInputs(tokens[:, -1:], prompt(self.eager, tokens[:, :-1])[1])
                else:
                    case = CellInputs(tokens[:, -1:], cell.length)
                self.cases[cell] = case
                if cell.batch * cell.length > self.options.checked:
                    continue
                if exact is None:
                    exact = load(self.checkpoint, torch.float32, self.device)
                wide = [] if cell.kind == "prompt" else [(k.float(), v.float()) for k, v in case.caches]
                step = TorchRun(exact, None, self.last)
                case.exact = step.decode(case.tokens, wide)() if wide else step.prompt(case.tokens)()
                half = TorchRun(self.eager, None, self.last)
                ours = half.decode(case.tokens, case.caches)() if wide else half.prompt(case.tokens)()
                case.eager_error = relative_norm(ours, case.exact)
                del wide
        del exact
        free_memory(self.device)
        self.clock.say("references computed")

    def _run(self, name: str, cells: list[Cell]) -> None:
        runner = self._runner(name)
        for cell in cells:
            if self.clock.seconds > self.options.budget:
                self._add(CellResult(name, str(cell), note="not run: out of time"))
                continue
            try:
                self._add(self._measure(name, runner, cell))
            except Exception as error:  # one form failing must not cost the others their figures
                self._add(CellResult(name, str(cell), note=f"failed: {type(error).__name__}: {str(error)[:300]}"))
                if self.options.strict:
                    raise
                traceback.print_exc()
            free_memory(self.device)
        runner.close()
        del runner
        free_memory(self.device)

    def _runner(self, name: str) -> TorchRun | OnnxRun:
        if name == "eager":
            return TorchRun(self.eager, None, self.last)
        if name.startswith("compiled-"):
            return TorchRun(self.eager, name.removeprefix("compiled-"), self.last)
        stage = name.partition("-")[0]
        folder = self.options.graphs / {"exported": "export", "surgered": "surgery"}.get(stage, stage)
        model = folder / (OWN_OPERATORS if "onnxruntime" in name else "model.onnx")
        own = self.options.own_weights or name in QUANTISED
        return OnnxRun(model, self.device, name.endswith("cuda-graph"), None if own else self.options.checkpoint.resolve())

    def _measure(self, name: str, runner: TorchRun | OnnxRun, cell: Cell) -> CellResult:
        case = self.cases[cell]
        started = time.monotonic()
        step = runner.prompt(case.tokens) if cell.kind == "prompt" else runner.decode(case.tokens, case.caches)
        result = CellResult(name, str(cell), eager_error=case.eager_error)
        logits = step()
        if case.exact is not None:
            result.error = relative_norm(logits[:, -case.exact.shape[1] :], case.exact)
            _, rounding = QUANTISED.get(name, (None, ROUNDING))
            if not result.error <= max(TOLERANCE * case.eager_error, rounding):
                result.note = f"wrong: {result.error:.2e} from float32, eager {case.eager_error:.2e}"
                return result
        del logits
        self.seconds[f"{name} {cell}"] = round(time.monotonic() - started, 1)
        seconds = median_seconds(step, self.device, repeats=self.options.repeats)
        floor, moved = self._floor(cell, name)
        tokens = cell.batch * (1 if cell.kind == "decode" else cell.length)
        result.ms, result.tokens_per_s = 1e3 * seconds, tokens / seconds
        result.gb_per_s, result.percent_of_limit = moved / seconds / 1e9, 100 * floor / seconds
        if self.options.kernels == name and str(cell) == self.options.common:
            self.kernels = profile(step, self.device)
        return result

    def _floor(self, cell: Cell, name: str) -> tuple[float, float]:
        """Seconds below which the device cannot be, and the bytes that must be read: each matrix and each cached key and
        value once; or, where that takes longer, the multiplications of the matrices and of causal attention."""
        config, itemsize = self.config, self.dtype.itemsize
        body, head = config.layers * (4 * config.hidden**2 + 3 * config.hidden * config.ffn), config.hidden * config.vocab
        weight = (QUANTISED[name][0], HEAD_BYTES) if name in QUANTISED else (itemsize, itemsize)
        width = config.heads * config.head_dim
        cached = 2 * config.layers * width * cell.batch * (cell.length if cell.kind == "decode" else 0)
        tokens = cell.batch * (1 if cell.kind == "decode" else cell.length)
        seen = cell.length if cell.kind == "decode" else cell.length / 2
        moved = weight[0] * body + weight[1] * head + itemsize * cached
        read_out = cell.batch if self.last else tokens
        arithmetic = 2 * tokens * body + 2 * read_out * head + 4 * tokens * seen * width * config.layers
        return max(moved / self.limits.read_bytes_per_s, arithmetic / self.limits.matmul_flop_per_s), moved

    def _add(self, result: CellResult) -> None:
        self.results.append(result)
        print(_line(result), flush=True)
        if self.options.out:
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            content = {
                "limits": self.limits.as_json(),
                "versions": {**versions, "onnxruntime": onnxruntime.__version__},
                "dtype": self.checkpoint.dtype,
                "layers": self.config.layers,
                "logits": self.options.logits,
                "results": [asdict(each) for each in self.results],
                "seconds_until_first_result": self.seconds,
                "kernels": self.kernels,
            }
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            self.options.out.write_text(json.dumps(content, indent=2) + "\n")

    def _summary(self) -> str:
        lines = ["", f"{self.limits}", *map(_line, self.results)]
        return "\n".join(lines + (["", table(self.kernels)] if self.kernels else []))


def _line(result: CellResult) -> str:
    if result.ms is None:
        return f"{result.run:26} {result.cell:14} {result.note}"
    error = "not checked" if result.error is None else f"error {result.error:.1e} (eager {result.eager_error:.1e})"
    return (
        f"{result.run:26} {result.cell:14} {result.ms:8.3f} ms {result.tokens_per_s:10,.0f} tokens/s "
        f"{result.gb_per_s:7.0f} GB/s {result.percent_of_limit:5.1f} % of the limit  {error}"
    )


def main() -> int:
    parser = CommandParser(prog="gpu_decode", description="Time decoding: transformers and our graphs, side by side.")
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, required=True)
    parser.add_argument("--graphs", metavar="DIR", type=Path, required=True, help="with export/ and surgery/ in it")
    parser.add_argument("--own-weights", action="store_true", help="the graphs have copies of the weights beside them")
    parser.add_argument(
        "--runs",
        nargs="+",
        choices=RUNS,
        default=FLOATS,
        metavar="RUN",
        help=f"of {', '.join(RUNS)}",
    )
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="such as 'decode 16x512' or 'prompt 2048'")
    parser.add_argument("--logits", choices=("all", "last"), default="all",
                        help="of a prompt: all (%(default)s), or the last token's, as generating needs; then GRAPHS/surgery "
                        "is made with --logits last, too")  # fmt: skip
    parser.add_argument("--common", default=ONE_OF_ALL, help="the cell that every run measures (%(default)s)")
    parser.add_argument("--checked", type=int, default=8192, help="check cells of at most so many tokens (%(default)s)")
    parser.add_argument("--repeats", type=int, default=gpu_limits.REPEATS, help="of each step (%(default)s)")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no cell begins (%(default)s)")
    parser.add_argument("--kernels", choices=RUNS, help="the run whose kernels are listed, in the common cell")
    parser.add_argument("--strict", action="store_true", help="stop at the first run that fails")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", metavar="FILE", type=Path, help="JSON, rewritten after every cell")
    options = parser.parse_args()
    return Benchmark(options).main()


if __name__ == "__main__":
    run("gpu_decode", main)
