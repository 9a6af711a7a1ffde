"""The good inputs that cases damage: a checkpoint, a decoder's graph with its weights beside it, a tokenizer."""

import json
import shutil
from pathlib import Path

import network_graphs
import numpy as np
import onnx
import torch
from decoder_graphs import VOCAB, decoder_graph
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from suture.models.named import checkpoint_folder
from suture.models.random_weights import write
from suture.runtime.graphs import open_graph
from suture.validate import golden
from suture.validate.bundle import FEED, identity
from suture.validate.pipeline import find_pipeline
from suture.validate.scenarios import make_scenarios, random_tokens

CONFIG = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": 2304, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "kv_channels": 8, "intermediate_size": 32, "seq_length": 8, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
FIRST = """<ir_version: 10, opset_import: ["": 18]> first (float[n, 4] x, float[1] t) => (float[n, 4] h)
    <float[4, 4] w = {1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 1, 1, 1, 1}>
    { wave = Sin(t) twice = Mul(wave, wave) a = MatMul(x, w) h = Add(a, twice) }"""  # `twice` can be cut: it depends on t alone
SECOND = """<ir_version: 10, opset_import: ["": 18]> second (float[m, 4] h) => (float[m, 4] z) { z = Neg(h) }"""
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def make(folder: Path) -> None:
    write(CONFIG, folder / "checkpoint", "float32", seed=0)
    shutil.copyfile(checkpoint_folder("tiny-qwen") / "qwen.tiktoken", folder / "checkpoint" / "qwen.tiktoken")
    (folder / "graphs").mkdir()
    onnx.save(decoder_graph(static=False), folder / "graphs" / "model.onnx", save_as_external_data=True,
              location="model.data", size_threshold=1024)  # fmt: skip
    (folder / "static").mkdir()
    onnx.save(decoder_graph(static=True), folder / "static" / "model.onnx", save_as_external_data=True, location="model.data",
              size_threshold=1024)  # fmt: skip
    (folder / "pair").mkdir()
    first = onnx.parser.parse_model(FIRST)
    for tensor in first.graph.initializer:  # as bytes, which alone can lie elsewhere
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(first, folder / "pair" / "model.onnx", save_as_external_data=True, location="model.data",
              size_threshold=0)  # fmt: skip
    onnx.save(onnx.parser.parse_model(SECOND), folder / "pair" / "second.onnx")
    pipeline(folder / "pipeline")
    shutil.copytree(folder / "pipeline", folder / "bundled")
    results(folder / "bundled")
    golden.save(find_pipeline(folder / "pipeline", None), folder / "golden", None, seed=0, force=False)
    torch.save({"weight": torch.zeros(2, 2)}, folder / "checkpoint" / "model.bin")
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


def results(folder: Path) -> None:
    """An engine of a few bytes, and what a bundle's run.py brings back: the portable graph's own values, of one step."""
    (folder / "build").mkdir()
    (folder / "build" / "model.engine").write_bytes(b"engine")
    (folder / "build" / "engine.json").write_text("{}")
    graphs = folder / "surgery" / "model.onnx", folder / "surgery" / "model.trt.onnx"
    model = open_graph(graphs[0])
    scenario = make_scenarios(random_tokens(model.vocab, 0), model.capacity, None)[0]
    decoder, arrays = model.decoder(len(scenario.steps[0]["counts"])), {}
    for number, step in enumerate(scenario.steps):
        feed = [step[name] for name in FEED]
        arrays |= {f"0/{number}/{name}": value for name, value in zip(FEED, feed)}
        arrays[f"0/{number}/logits"] = decoder.step(*feed)
    arrays |= {f"0/{cache.past}": value for cache, value in zip(model.signature.caches, decoder.caches())}
    about = {"identity": identity(*graphs), "gpu": "none", "tensorrt": "none", "decode_seconds": None, "left_out": [],
             "scenarios": [{"name": scenario.name, "what": scenario.what, "steps": len(scenario.steps)}]}  # fmt: skip
    np.savez(folder / "results.npz", about=json.dumps(about), **arrays)


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
