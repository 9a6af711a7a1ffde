"""Tiny graphs of onnxruntime-genai's builder, as it writes them for other runtimes: com.microsoft ops, without weights.

python tests/graphs/genai.py [NAME ...]        needs: pip install onnxruntime-genai==0.18.0
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import torch
import transformers
from tokenizers import Tokenizer, models

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import weightless  # noqa: E402

from suture.core.head_sizes import write_head_sizes  # noqa: E402

SMALL = {
    "vocab_size": 192, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160,
    "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED, TIED = {"num_key_value_heads": 2}, {"tie_word_embeddings": True}
# name -> config class, its arguments beside SMALL, the builder's
GRAPHS = {
    "llama-int4-asymmetric": ("LlamaConfig", GROUPED, ["int4", "cpu", "is_symmetric=false"]),
    "llama-int4-tied": ("LlamaConfig", GROUPED | TIED, ["int4", "cpu", "shared_embeddings=true"]),
    "phi-float32": ("PhiConfig", {"partial_rotary_factor": 0.5}, ["fp32", "cpu"]),
    "qwen3-float16": ("Qwen3Config", GROUPED | {"head_dim": 32}, ["fp16", "cpu"]),
}


def make(name: str) -> None:
    config, arguments, (dtype, provider, *options) = GRAPHS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**SMALL | arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, out = Path(folder) / "checkpoint", Path(folder) / "out"
        model.float().save_pretrained(checkpoint)
        words = {"<unk>": 0} | {str(i): i for i in range(1, SMALL["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(checkpoint)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "x", "-i", checkpoint, "-o", out]
        command += ["-c", Path(folder) / "cache", "-p", dtype, "-e", provider]
        command += ["--extra_options", *options] if options else []
        subprocess.run(command, check=True)
        graph = onnx.load(out / "model.onnx")
    write_head_sizes(graph)
    weightless.save(graph, f"genai/{name}")


if __name__ == "__main__":
    (weightless.FOLDER / "genai").mkdir(exist_ok=True)
    for name in sys.argv[1:] or GRAPHS:
        make(name)
        print(name, (weightless.FOLDER / "genai" / f"{name}.onnx.gz").stat().st_size)
