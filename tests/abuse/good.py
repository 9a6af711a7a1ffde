"""The good inputs that cases damage: a checkpoint, a decoder's graph with its weights beside it, a tokenizer."""

import json
import shutil
from pathlib import Path

import network_graphs
import onnx
from decoder_graphs import VOCAB, decoder_graph
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from suture.models.named import checkpoint_folder
from suture.models.random_weights import write
from suture.validate import golden
from suture.validate.pipeline import find_pipeline

CONFIG = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": 2304, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "kv_channels": 8, "intermediate_size": 32, "seq_length": 8, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def make(folder: Path) -> None:
    write(CONFIG, folder / "checkpoint", "float32", seed=0)
    shutil.copyfile(checkpoint_folder("tiny-qwen") / "qwen.tiktoken", folder / "checkpoint" / "qwen.tiktoken")
    (folder / "graphs").mkdir()
    onnx.save(decoder_graph(static=False), folder / "graphs" / "model.onnx", save_as_external_data=True,
              location="model.data", size_threshold=1024)  # fmt: skip
    (folder / "static").mkdir()
    onnx.save(decoder_graph(static=True), folder / "static" / "model.onnx")
    pipeline(folder / "pipeline")
    golden.save(find_pipeline(folder / "pipeline", None), folder / "golden", None, seed=0, force=False)
    (folder / "secret").write_bytes(b"a secret of somebody else's" * 10)
    (folder / "prompts.txt").write_text("ab\n")
    library = folder / "library"
    library.mkdir()
    alphabet = [*map(chr, range(ord("@"), ord("@") + VOCAB - 1)), "<|end|>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(library / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (library / "tokenizer_config.json").write_text(json.dumps(settings))
    (library / "generation_config.json").write_text(json.dumps({"eos_token_id": VOCAB - 1}))


def pipeline(folder: Path) -> None:
    """What export and surgery leave: three graphs that mean the same, listed in manifests."""
    portable = network_graphs.portable("float")
    models = {
        "export/model.onnx": portable,
        "surgery/model.onnx": portable,
        "surgery/model.trt.onnx": network_graphs.lowered("float"),
    }
    for name, model in models.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, folder / name)
    for stage in ("export", "surgery"):
        outputs = {path.name: path.stat().st_size for path in (folder / stage).iterdir()}
        said = {"outputs": outputs, "options": {}, "seconds": 1.0, "peak_memory_bytes": 1}
        (folder / stage / "manifest.json").write_text(json.dumps(said), encoding="utf-8")
