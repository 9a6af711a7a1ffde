"""What the tests of export share: a small checkpoint, its export, and both models on the same input."""

import json
import shutil
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors.torch import load_file, save_file

from suture.core.sessions import ROOT_OPTION
from suture.core.weights import weights_root
from suture.export import stage
from suture.export.options import ExportOptions
from suture.models.architectures import load_model, open_checkpoint
from suture.models.named import checkpoint_folder

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 5  # one more than are traced
CONFIG = json.loads((ROOT / "models" / "tiny-qwen" / "config.json").read_text()) | {
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "kv_channels": 16,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 99,
    "seq_length": 16,
}


def export(checkpoint: Path, out: Path, force: bool = False, pipeline: bool = False, **options: str | None) -> Path:
    """`options`: dtype, weights, part."""
    stage.export(out, ExportOptions(checkpoint=checkpoint, **options), force, pipeline)
    return out / "model.onnx"


def overwritten(checkpoint: Path, other: Path, name: str, begins: bytes) -> Path:
    """A copy of the checkpoint in the folder `other`, whose tensor `name` begins with these bytes."""
    shutil.copytree(checkpoint, other)
    entry = open_checkpoint(other).tensors[name]
    with open(entry.file, "r+b") as file:
        file.seek(entry.offset)
        file.write(begins)
    return other


def session(model: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(ROOT_OPTION, str(weights_root(model)))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def both(model: Path, checkpoint: Path, mask: list[list[int]], steps: int, alpha: list[float]) -> list[tuple]:
    """Random tokens into the graph and into torch, the last `steps` columns of `mask` after a cache of random values;
    each output from both, rows of padding left out."""
    opened = open_checkpoint(checkpoint)
    module = load_model(opened, torch.float32)
    dims = module.dimensions
    mask = torch.tensor(mask)
    rows, total = mask.shape
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(dims.vocab, (rows, steps), generator=generator)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -steps:]
    shape = rows, dims.kv_heads, total - steps, dims.head_dim
    past = [torch.randn(shape, generator=generator) for _ in range(2 * dims.layers)]
    alphas = torch.tensor(alpha)
    with torch.no_grad():
        logits, presents = module(ids, positions, mask, past, alphas)
    names = [f"past_key_values.{i}.{role}" for i in range(dims.layers) for role in ("key", "value")]
    feeds = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "ntk_alpha": alphas, **dict(zip(names, past))}
    found = session(model).run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    valid = mask[:, -steps:].bool()
    pairs = [(found[0][valid], logits[valid].numpy())]
    return pairs + [(ours, theirs.numpy()) for ours, theirs in zip(found[1:], presents)]


def first_layer(folder: Path) -> Path:
    """tiny-qwen with one layer, its first, as a checkpoint in `folder`."""
    source = checkpoint_folder("tiny-qwen")
    weights = load_file(source / "model.safetensors")
    kept = {name: each for name, each in weights.items() if ".h." not in name or ".h.0." in name}
    save_file(kept, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "qwen.tiktoken", folder)
    return folder


def sum_of_bytes(checkpoint: Path) -> int:
    return sum(entry.length for entry in open_checkpoint(checkpoint).tensors.values())


def traced(exported: Path, dtype: torch.dtype) -> ir.Model:
    proto = onnx.load(exported, load_external_data=False)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.data_type = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}[dtype]
    return ir.from_proto(proto)
