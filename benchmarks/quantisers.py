"""Quantisers side by side: 4-bit weights of tiny-qwen by this project's, onnxruntime's and nvidia-modelopt's.

    python -m benchmarks.quantisers [--modelopt PYTHON] [--block 64] [--windows 24] [--work DIR]

All get the same graph, its vocabulary's product left as it is, and the same calibration windows; the measure is that of
benchmarks.quantisation, and whether TensorRT's parser takes the result. nvidia-modelopt pins an onnx and an onnxruntime of
its own, so it runs in the interpreter that --modelopt names (requirements-bench.txt says what belongs there).
"""

import argparse
import logging
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.processes import stage
from benchmarks.quantisation import WINDOW, continue_prompts, measure_row
from suture.core.command import CommandParser, run
from suture.core.errors import UserError
from suture.core.network.parse import parse
from suture.core.signature import find_signature, ntk_alpha
from suture.export.packed import IR_VERSION, OPSET
from suture.models.named import checkpoint_folder
from suture.models.tokenizer import open_tokenizer
from suture.surgery.quantize.calibration import read_windows
from suture.surgery.quantize.formats import BLOCKS
from suture.surgery.quantize.options import Request
from suture.validate.reference import open_reference

METHODS = ("rtn_dq", "awq_lite", "awq_clip")  # nvidia-modelopt's
MODELOPT = """
import sys, numpy, onnx
from modelopt.onnx.quantization.int4 import quantize
from onnxruntime.quantization.calibrate import CalibrationDataReader
source, out, method, block, head, feeds = sys.argv[1:]
class Reader(CalibrationDataReader):
    def __init__(self): self.left = windows()
    def get_next(self): return self.left.pop(0) if self.left else None
    def get_first(self): return windows()[0]
    def rewind(self): self.left = windows()
def windows():
    arrays = numpy.load(feeds)
    shared = {name: arrays[name] for name in arrays.files if name != "tokens"}
    return [dict(shared, input_ids=row[None]) for row in arrays["tokens"]]
model = quantize(source, calibration_method=method, calibration_data_reader=None if method == "rtn_dq" else Reader(),
                 calibration_eps=["cpu"], use_external_data_format=False, block_size=int(block), nodes_to_exclude=[head],
                 awqlite_fuse_nodes=False)  # fusing asks numpy's arrays for what only cupy's have
onnx.save(model, out)
"""


def main() -> None:
    parser = CommandParser(prog="quantisers", description="4-bit weights by several quantisers, measured alike.")
    parser.add_argument("--modelopt", metavar="PYTHON", type=Path, help="an interpreter that has nvidia-modelopt[onnx]")
    parser.add_argument("--block", type=int, choices=BLOCKS, default=64, help="weights to a scale (%(default)s)")
    parser.add_argument("--windows", type=int, default=24, help=f"of {WINDOW} tokens (%(default)s)")
    parser.add_argument("--work", metavar="DIR", type=Path, help="keep the graphs here, and take those that are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        compare(options, (options.work or Path(scratch)).absolute())


def compare(options: argparse.Namespace, work: Path) -> None:
    checkpoint = checkpoint_folder("tiny-qwen")
    tokenizer, reference = open_tokenizer(checkpoint), open_reference(checkpoint)
    ids = tokenizer.encode((checkpoint / "heldout.txt").read_text(encoding="utf-8"))
    stage("export", "--model", "tiny-qwen", "--dtype", "float32", "--out", work / "export")
    exported = work / "export" / "model.onnx"
    plain, head = write_plain(exported, work / "plain.onnx")
    continued = continue_prompts(reference, ids, reference.trained_length, new_tokens=1)  # a column that this table has not
    print("| quantiser | bytes | perplexity | change | mean KL | 99 % of KL | TensorRT's parser |")
    print("|---|---|---|---|---|---|---|")
    for name, quantise in quantisers(options, work, exported, plain, head).items():
        path = work / f"{name}.onnx".replace(" ", "-").replace(",", "")
        if not path.exists():
            try:
                path = quantise(path)
            except UserError as error:  # of another's quantiser, which says what is the matter
                print(f"| {name} | {error} | | | | | |", flush=True)
                continue
        row = measure_row(name, path, reference, tokenizer, ids, options.windows, continued)
        print(f"| {name} | {row.bytes / 1e6:.2f} MB | {row.perplexity:.4f} | {row.change:+.2%} | {row.mean_kl:.2e} | "
              f"{row.kl_99:.2e} | {parsed(path)} |", flush=True)  # fmt: skip


def quantisers(
    options: argparse.Namespace, work: Path, exported: Path, plain: Path, head: str
) -> dict[str, Callable[[Path], Path]]:
    """By name, what writes a quantised graph into a file, and says where that is."""

    def ours(format: str) -> Callable[[Path], Path]:
        def quantise(path: Path) -> Path:
            out = path.with_suffix("")
            arguments = ["--cache", "growing", "--quantize", format, "--group-size", options.block, "--lm-head", "none"]
            stage("surgery", exported, "--out", out, *arguments)
            return out / "model.onnx"

        return quantise

    def onnxruntimes(path: Path) -> Path:
        from onnxruntime.quantization import QuantFormat
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
        quantiser = MatMulNBitsQuantizer(
            onnx.load(plain), block_size=options.block, is_symmetric=True, quant_format=QuantFormat.QDQ, nodes_to_exclude=[head]
        )
        quantiser.process()
        quantiser.model.save_model_to_file(str(path))
        return path

    def modelopts(method: str) -> Callable[[Path], Path]:
        def quantise(path: Path) -> Path:
            feeds = work / "windows.npz"
            np.savez(feeds, **calibration(exported))
            line = [options.modelopt.absolute(), "-c", MODELOPT, plain, path, method, options.block, head, feeds]
            done = subprocess.run([str(each) for each in line], capture_output=True, text=True, check=False, cwd=work)
            if done.returncode:
                raise UserError("nvidia-modelopt", done.stderr.strip().split("\n")[-1], "see whether it needs a GPU")
            return path

        return quantise

    found = {"onnxruntime, to the nearest": onnxruntimes}
    if options.modelopt:
        found |= {f"nvidia-modelopt, {method}": modelopts(method) for method in METHODS}
    return found | {"ours, to the nearest": ours("int4"), "ours, awq": ours("int4-awq")}


def write_plain(exported: Path, path: Path) -> tuple[Path, str]:
    """The exported graph with its weights as constants [in, out], which is all that other quantisers find, in one file;
    and the name of the vocabulary's product."""
    model = onnx.load(exported)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in tensors]:
        weight = np.ascontiguousarray(numpy_helper.to_array(tensors[node.input[0]]).T)
        model.graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
        model.graph.initializer.remove(tensors[node.input[0]])
        model.graph.node.remove(node)
    signature = find_signature(model, exported)
    model.opset_import[0].version = max(model.opset_import[0].version, OPSET)
    model.ir_version = max(model.ir_version, IR_VERSION)
    onnx.save(model, path)
    return path, next(node.name for node in reversed(model.graph.node) if signature.logits in node.output)


def calibration(exported: Path) -> dict[str, np.ndarray]:
    """tokens [windows, tokens], and what else the exported graph takes with each of them."""
    model = onnx.load(exported, load_external_data=False)
    names = find_signature(model, exported)
    windows = read_windows(Request("int4-awq"), exported, None)
    steps = windows.shape[1]
    feeds = {
        "tokens": windows,
        names.positions: np.arange(steps)[None],
        names.mask: np.ones((1, steps), np.int64),
        names.ntk_alpha: np.full(1, ntk_alpha(steps, names.ntk_trained_length), np.float32),
    }
    shapes = {value.name: [each.dim_value for each in value.type.tensor_type.shape.dim] for value in model.graph.input}
    empty = {cache.past: np.zeros((1, shapes[cache.past][1], 0, shapes[cache.past][3]), np.float32) for cache in names.caches}
    return {name: array for name, array in (feeds | empty).items() if name in shapes or name == "tokens"}


def parsed(path: Path) -> str:
    try:
        parse(path)
    except UserError as error:
        return f"refuses it: {error}"
    return "takes it"


if __name__ == "__main__":
    run("quantisers", main)
