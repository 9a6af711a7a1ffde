"""Each family at a tiny random size, in the layout that transformers saves: what tests and benchmarks.models run."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
import transformers
from filelock import FileLock
from safetensors.torch import save_file

from suture.core.parts import DECODER, find_parts
from suture.export.options import ExportOptions
from suture.export.stage import export
from suture.models import random_weights
from suture.models.architectures import architecture
from suture.surgery import __main__ as surgery
from suture.validate.options import ValidateOptions
from suture.validate.stage import validate_pipeline
from tests.stored_traces import tracing_stored

ROOT = Path(__file__).parents[1]
CAPACITY = 64
TYPES = ("float32", "float16", "bfloat16")
CAPABILITIES = "8.6 8.9 12.0"
FUSED = ("Attention", "RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Swish", "Gelu", "TensorScatter")
DECOMPOSED = ("Softmax", "ReduceMean", "Sigmoid", "Erf", "Tanh")

# fmt: off
SMALL = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 80, "bos_token_id": 1, "eos_token_id": 2}
# fmt: on

llama = {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4, "Swish": 2, "TensorScatter": 4}
gpt2 = {"Attention": 2, "LayerNormalization": 5, "Gelu": 2, "TensorScatter": 4}


@dataclass(frozen=True)
class Family:
    """`model`: transformers' class that saves the checkpoint and gives the reference, None where transformers has none;
    `fused`: what surgery must find."""

    model: str | None
    config: dict
    fused: dict[str, int]


# fmt: off
CPM = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 16, "dim_ff": 96,
       "position_bias_num_buckets": 16, "position_bias_max_distance": 24}
# fmt: on

FAMILIES = {
    "qwen": Family(
        None,
        {
            "model_type": "qwen",
            "architectures": ["QWenLMHeadModel"],
            "vocab_size": 160,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "kv_channels": 16,
            "intermediate_size": 192,
            "seq_length": 32,
            "layer_norm_epsilon": 1e-6,
        },
        llama,
    ),
    "llama": Family("LlamaForCausalLM", SMALL | {"tie_word_embeddings": False}, llama),
    "mistral": Family("MistralForCausalLM", SMALL | {"tie_word_embeddings": False, "sliding_window": 8}, llama),
    "qwen2": Family("Qwen2ForCausalLM", SMALL | {"tie_word_embeddings": True}, llama),
    "qwen3": Family(
        "Qwen3ForCausalLM", SMALL | {"head_dim": 32, "tie_word_embeddings": False}, llama | {"RMSNormalization": 9}
    ),
    "gpt2": Family("GPT2LMHeadModel", GPT, gpt2),
    "opt": Family(
        "OPTForCausalLM",
        {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "intermediate_size")}
        | {"ffn_dim": 96, "word_embed_proj_dim": 64, "activation_function": "gelu", "enable_bias": False},
        gpt2,
    ),
    "gptbigcode": Family("GPTBigCodeForCausalLM", GPT | {"multi_query": True}, gpt2),
    "decicoder": Family("LlamaForCausalLM", SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": False}, llama),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 160,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 80,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
        },
        {"Attention": 4, "LayerNormalization": 7, "Gelu": 2, "TensorScatter": 4},
    ),
    "cpmant": Family(
        "CpmAntForCausalLM",
        CPM | {"prompt_types": 3, "prompt_length": 4, "segment_types": 4, "init_std": 0.02},
        {"Attention": 2, "RMSNormalization": 5, "Gelu": 2, "TensorScatter": 4},
    ),
    "cpmbee": Family(
        "CpmBeeForCausalLM",
        CPM | {"position_bias_num_segment_buckets": 9, "distance_scale": 16},
        {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 1, "Gelu": 2, "TensorScatter": 4},
    ),
    "mpt": Family(
        "MptForCausalLM",
        {"vocab_size": 160, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "attn_config": {"clip_qkv": 1.5}},
        gpt2,
    ),
}


RENAMED = {
    "decicoder": "DeciCoderForCausalLM"
}  # what a checkpoint calls an architecture that transformers has under another name


def reference(name: str) -> torch.nn.Module:
    """transformers' own model, random from a fixed seed; norms and biases are disturbed as well."""
    family = FAMILIES[name]
    model_class = getattr(transformers, family.model)
    torch.manual_seed(0)
    config = model_class.config_class(**family.config)
    model = model_class._from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(name: str, folder: Path) -> None:
    """A checkpoint of a family that transformers does not have: normal weights, those of norms around 1."""
    config = {"model_type": name, "architectures": [FAMILIES[name].model], **FAMILIES[name].config}
    torch.manual_seed(0)
    tensors = {}
    for tensor, empty in architecture(config, folder / "config.json").state_dict().items():
        tensors[tensor] = torch.randn(empty.shape) * 0.1 + 1 if empty.dim() == 1 else torch.randn(empty.shape)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))


def checkpoint(name: str, shared: Path) -> Path:
    """The folder that transformers' save_pretrained writes, once for all workers."""
    folder, family = shared / name / "checkpoint", FAMILIES[name]
    with FileLock(f"{shared}/{name}.lock"):
        if (folder / "config.json").exists():
            return folder
        if family.model is None:
            random_weights.write(family.config, folder, "float32", seed=0)
        elif hasattr(transformers, family.model):
            reference(name).save_pretrained(folder)
        else:
            save(name, folder)
        if name in RENAMED:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"architectures": [RENAMED[name]]}))
    return folder


def operated(name: str, dtype: str, shared: Path) -> Path:
    """A pipeline's folder with the family exported and operated on, once for all workers."""
    source, out = checkpoint(name, shared), shared / name / dtype
    with FileLock(f"{shared}/{name}-{dtype}.lock"), tracing_stored(name, dtype):
        export_and_operate(source, out, dtype)
    return out


def export_and_operate(source: Path, out: Path, dtype: str, weights: str | None = None) -> None:
    """Every part."""
    export(out, ExportOptions(checkpoint=source, dtype=dtype, weights=weights), pipeline=True)
    for part in find_parts(out):
        capacity = ["--capacity", str(CAPACITY)] if part.kind == DECODER else []
        surgery.main([str(part.folder / "export" / "model.onnx"), "--out", str(part.folder / "surgery"), *capacity])


def surgered(out: Path) -> list[Path]:
    """The folders of a pipeline's folder that surgery wrote."""
    return [part.folder / "surgery" for part in find_parts(out)]


def levels(out: Path) -> list[dict]:
    """What levels 1, 2 and 3 of a pipeline's folder found of each part."""
    validate_pipeline(out, ValidateOptions())
    report = json.loads((out / "validate" / "report.json").read_text())
    return [level for level in report["levels"] if level["number"] < 4]


def worst(found: list[dict]) -> dict[str, str]:
    """The largest error of each level, of the largest value."""
    errors = [(f"level {level['number']}", level["comparison"]["worst"]["error"]) for level in found]
    return {number: f"{max(error for each, error in errors if each == number):.1e}" for number, _ in errors}


def build(folder: Path, *options: str) -> dict:
    """Builds the engine of what surgery wrote into `folder`; engine.json."""
    out = folder.parent / "build"
    command = [sys.executable, "-m", "suture.build", folder / "model.trt.onnx", "--out", out, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "engine.json").read_text())


def counts(model: onnx.ModelProto, ops: tuple[str, ...]) -> dict[str, int]:
    found = Counter(node.op_type for node in model.graph.node)
    return {op: found[op] for op in ops if found[op]}
