"""Kind 10: values and contents that a file cannot have: one line that says which file, what is wrong, what to do."""

import json
import struct
from pathlib import Path

import numpy as np

from tests.abuse.case import CUTTERS, GRAPH_STAGES, SECOND, Case, folder_of
from tests.abuse.damages import Damage, at, cut, header, keys, written

PROMISE = "bad input is one line with the file's name, and exit status 2"

CONFIGS = {
    "string for a boolean": keys(use_dynamic_ntk="false"),
    "10**9 layers": keys(num_hidden_layers=10**9),
    "no layers": keys(num_hidden_layers=0),
    "negative layers": keys(num_hidden_layers=-1),
    "float layers": keys(num_hidden_layers=2.0),
    "boolean layers": keys(num_hidden_layers=True),
    "string width": keys(hidden_size="16"),
    "width of 10**12": keys(hidden_size=10**12),
    "heads that do not divide": keys(num_attention_heads=3, kv_channels=None),
    "no heads": keys(num_attention_heads=0),
    "odd head": keys(kv_channels=7),
    "head of two": keys(kv_channels=2),
    "list for a vocabulary": keys(vocab_size=[2304]),
    "object for a vocabulary": keys(vocab_size={}),
    "empty vocabulary": keys(vocab_size=0),
    "huge vocabulary": keys(vocab_size=10**15),
    "seq_length 1": keys(seq_length=1),
    "epsilon 0": keys(layer_norm_epsilon=0),
    "string epsilon": keys(layer_norm_epsilon="1e-6"),
    "base 0": keys(rotary_emb_base=0),
    "partial rotary": keys(rotary_pct=0.5),
    "model_type list": keys(model_type=["qwen"]),
    "model_type unknown": keys(model_type="nobody"),
    "architectures string": keys(architectures="QWenLMHeadModel"),
    "architectures of numbers": keys(architectures=[1]),
    "no width": keys(hidden_size=None),
    "no vocabulary": keys(vocab_size=None),
    "quantisation list": keys(quantization_config=[1]),
    "other width": keys(hidden_size=32),
    "llama without its keys": keys(model_type="llama", architectures=["LlamaForCausalLM"], intermediate_size=None),
    "llama with an unknown activation": keys(model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="nothing"),
    "llama with a broken rope": keys(
        model_type="llama", architectures=["LlamaForCausalLM"], rope_scaling={"rope_type": "yarn"}
    ),
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 107293\n"  # in place of a file
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"  # what a download without a login brings
TEXT = b'<ir_version: 10, opset_import: ["": 18]> g (float[n] x) => (float[n] y) { y = Neg(x) }\n'
JSONS = {
    "a pointer of Git LFS": POINTER, "a page of HTML": PAGE, "lines of JSON": b'{"a": 1}\n{"b": 2}\n', "a comment": b'{"a": 1} // a\n',
    "one quote": b"{'a': 1}",
    "empty": b"", "no json": b"{", "list": b"[]", "number": b"1", "null": b"null", "NaN": b'{"hidden_size": NaN}',
    "infinity": b'{"hidden_size": 1e999}', "deep": b'{"a":' * 100_000, "deep list": b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "no UTF-8": b'{"a": "\xff"}', "key twice": b'{"a": 1, "a": 2}', "UTF-16": '{"a": 1}'.encode("utf-16"),
    "long number": b'{"vocab_size": ' + b"9" * 5000 + b"}", "binary": bytes(range(256)),
}  # fmt: skip
WEIGHT = "transformer.wte.weight"
HEADERS = {
    "type unknown": header(lambda found: found[WEIGHT].update(dtype="F31")),
    "type list": header(lambda found: found[WEIGHT].update(dtype=[])),
    "shape negative": header(lambda found: found[WEIGHT].update(shape=[-2304, -16])),
    "shape overflows": header(lambda found: found[WEIGHT].update(shape=[2**40, 2**40])),
    "shape string": header(lambda found: found[WEIGHT].update(shape="2304")),
    "shape boolean": header(lambda found: found[WEIGHT].update(shape=[True, 36864])),
    "offset negative": header(lambda found: found[WEIGHT].update(data_offsets=[-4, 147452])),
    "offsets turned": header(lambda found: found[WEIGHT]["data_offsets"].reverse()),
    "one offset": header(lambda found: found[WEIGHT]["data_offsets"].pop()),
    "offset beyond": header(lambda found: found[WEIGHT].update(data_offsets=[2**60, 2**60 + 147456])),
    "overlap": header(lambda found: found.update(other=dict(found[WEIGHT]))),
    "no shape": header(lambda found: found[WEIGHT].pop("shape")),
    "number for a tensor": header(lambda found: found.update({WEIGHT: 3})),
    "no tensors": header(dict.clear),
    "cut": cut(0.5), "cut in the header": cut(0.001), "empty": written(b""), "huge header": written(struct.pack("<Q", 2**63) + b"{}"),
    "header is a list": written(struct.pack("<Q", 2) + b"[]"), "pickle": written(b"\x80\x02}q\0."),
    "a pointer of Git LFS": written(POINTER), "a page of HTML": written(PAGE), "a graph": written(b"\x08\x0a" * 50),
    "dimensions": header(lambda found: found[WEIGHT].update(shape=[1] * 1000)),
    "a key of 10 MB": header(lambda found: found.update({"a" * 10**7: 1})),
}  # fmt: skip
INDEX = "checkpoint/model.safetensors.index.json"
INDEXES = {
    "index outside": written(b'{"weight_map": {"a": "../model.safetensors"}}'),
    "index absolute": written(b'{"weight_map": {"a": "/etc/passwd"}}'),
    "index of numbers": written(b'{"weight_map": {"a": 1}}'),
    "index list": written(b'{"weight_map": []}'),
    "index with a NUL": written(b'{"weight_map": {"a": "a\\u0000.safetensors"}}'),
    "index of nothing": written(b'{"weight_map": {}}'),
    "index of a pickle": written(b'{"weight_map": {"a": "model.bin"}}'),
}

GRAPHS = {
    "empty": written(b""), "noise": written(bytes(range(256)) * 8), "text": written(b"hello\n" * 100), "json": written(b"{}"),
    "cut in half": cut(0.5), "cut at a tenth": cut(0.1), "cut at the end": cut(0.999), "gzip": written(b"\x1f\x8b\x08" + bytes(50)),
    "pickle": written(b"\x80\x02}q\0."), "deep": written(b"\x3a\x80\x80\x80\x08" * 200), "long varint": written(b"\xff" * 64),
    "zeros": written(bytes(1000)), "a pointer of Git LFS": written(POINTER), "a page of HTML": written(PAGE), "text of a graph": written(TEXT),
    "a program": written(b"\x7fELF" * 9),
    "weights": written(struct.pack("<Q", 2) + b"{}"),
    "twice itself": lambda path: path.write_bytes(2 * path.read_bytes()),
    "field of 4 GB": written(b"\x3a\xff\xff\xff\xff\x0f"), "wrong wire type": written(b"\x3d" + bytes(4)),
}  # fmt: skip


def external(key: str, value: str) -> at:
    """A weight's reference to its bytes, changed."""
    import onnx

    def damage(path) -> None:
        model = onnx.load(path, load_external_data=False)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.data_location == tensor.EXTERNAL)
        entries = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
        del tensor.external_data[:]
        for name, given in entries.items():
            tensor.external_data.add(key=name, value=given)
        path.write_bytes(model.SerializeToString())

    return damage


REFERENCES = {
    "offset negative": external("offset", "-8"), "offset text": external("offset", "x"), "offset beyond": external("offset", "1" * 15),
    "length negative": external("length", "-8"), "length short": external("length", "4"), "location empty": external("location", ""),
    "location outside": external("location", "../secret"), "location absolute": external("location", "/etc/passwd"),
}  # fmt: skip
LIBRARY = {
    **{f"tokenizer.json {name}": ("library/tokenizer.json", written(content)) for name, content in JSONS.items() if name != "key twice"},
    **{f"tokenizer_config.json {name}": ("library/tokenizer_config.json", written(content)) for name, content in JSONS.items()},
    **{f"generation_config.json {name}": ("library/generation_config.json", written(content)) for name, content in JSONS.items()
       if name not in ("long number",)},
    "eos is a string": ("library/generation_config.json", keys(eos_token_id="127")),
    "eos is a float": ("library/generation_config.json", keys(eos_token_id=[1.5])),
}  # fmt: skip
PICKLES = {  # what a .bin may begin with, and is no weights
    "zip": b"PK\x05\x06" + bytes(18), "a call": b"\x80\x02cos\nsystem\n(S'true'\ntR.", "cut call": b"\x80\x02cos\nsystem\n(",
    "numbers": b"\x80\x02]q\x00(K\x01K\x02e.", "memo": b"\x80\x02h\xff.", "long string": b"\x80\x02X\xff\xff\xff\x7f",
    "frame": b"\x80\x04\x95" + b"\xff" * 8,
}  # fmt: skip


def golden(*where: str | int, **values: object) -> at:
    """These keys of the object that lies there in golden.json; None leaves one out."""

    def damage(path) -> None:
        content = json.loads(path.read_text())
        found = content
        for key in where:
            found = found[key]
        found.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del found[key]
        path.write_text(json.dumps(content))

    return at("golden/golden.json", damage)


PART = ("parts", "decoder")
STEP = (*PART, "steps", 0)
OUTPUT = (*STEP, "outputs", "logits")
GOLDEN = {
    "no seed": golden(seed=None), "seed text": golden(seed="0"), "seed negative": golden(seed=-1), "parts list": golden(parts=[]),
    "no parts": golden(parts={}), "format": golden(format=2), "tolerance huge": golden(*PART, tolerance=1e308),
    "tolerance text": golden(*PART, tolerance="1"), "tolerance 0": golden(*PART, tolerance=0), "steps object": golden(*PART, steps={"a": 1}),
    "steps text": golden(*PART, steps="abc"), "no steps": golden(*PART, steps=[]), "step's name": golden(*STEP, name=[1]),
    "no outputs": golden(*STEP, outputs={}), "outputs list": golden(*STEP, outputs=[]), "output number": golden(*STEP, "outputs", logits=1),
    "shape text": golden(*OUTPUT, shape="x"), "shape negative": golden(*OUTPUT, shape=[-1]), "shape smaller": golden(*OUTPUT, shape=[1]),
    "no largest": golden(*OUTPUT, largest=None), "largest negative": golden(*OUTPUT, largest=-1), "largest text": golden(*OUTPUT, largest="1"),
}  # fmt: skip


def arrays(**values: np.ndarray | None) -> Damage:
    """These arrays of a .npz file; None leaves one out."""

    def damage(path: Path) -> None:
        with np.load(path) as file:
            found = dict(file)
        found |= {name.replace("__", "/"): value for name, value in values.items()}
        np.savez(path, **{name: value for name, value in found.items() if value is not None})

    return damage


def about(content: bytes) -> Damage:
    return arrays(about=np.array(content.decode("latin-1")))


def of_step(name: str, value: np.ndarray | None) -> Damage:
    return arrays(**{f"0__0__{name}": value})


RESULTS = {  # of a bundle
    "cut": cut(0.5), "cut at the end": cut(0.99), "empty": written(b""), "a pickle": written(b"\x80\x02}q\0."), "a page": written(PAGE),
    "pointer": written(POINTER), "no zip": written(bytes(range(256)) * 8), "no about": arrays(about=None), "no logits": of_step("logits", None),
    "no tokens": of_step("tokens", None), "no counts": of_step("counts", None), "no scale": of_step("alpha", None),
    "logits of integers": of_step("logits", np.zeros((1, 24, 50), np.int64)), "logits of a row": of_step("logits", np.zeros(50)),
    "logits of text": of_step("logits", np.array(["a"])), "objects": of_step("logits", np.array([{}], object)),
    "negative tokens": of_step("tokens", np.full((1, 24), -1)), "tokens beyond": of_step("tokens", np.full((1, 24), 10**9)),
    "negative counts": of_step("counts", np.array([-1])), "counts beyond": of_step("counts", np.array([10**9])),
    "tokens of floats": of_step("tokens", np.zeros((1, 24))), "no width": of_step("tokens", np.zeros((1, 0), np.int64)),
    "about is a number": arrays(about=np.array(1.0)),
}  # fmt: skip
RECORD = {"format": 1, "tensorrt": "1", "inputs": [], "outputs": [], "tensors": {}, "values": {},
          "layers": [{"type": "a", "node": None, "attributes": {}, "outputs": []}]}  # fmt: skip
RECORDS = {  # a network that check has saved, with another value
    "format 2": {"format": 2}, "version number": {"tensorrt": 1}, "no layers": {"layers": []}, "layers text": {"layers": "abc"},
    "layer number": {"layers": [1]}, "layer's outputs": {"layers": [{**RECORD["layers"][0], "outputs": ["a"]}]},
    "tensor of one word": {"tensors": {"a": ["float32"]}}, "values list": {"values": []},
    "value negative": {"values": {"a": {"y": {"shape": [1], "largest": -1.0, "values": []}}}},
    "values of text": {"values": {"a": {"y": {"shape": [1], "largest": 1.0, "values": ["x"]}}}}, "inputs text": {"inputs": "ab"},
}  # fmt: skip
REPORTS = {  # of validate's
    "no levels": {"levels": []}, "levels text": {"levels": "ab"}, "level number": {"levels": [1]}, "levels object": {"levels": {"a": 1}},
    "status": {"levels": [{"number": 1, "title": "a", "status": "fine"}]},
    "title": {"levels": [{"number": 1, "title": 1, "status": "passed"}]},
    "number": {"levels": [{"number": "1", "title": "a", "status": "passed"}]},
    "error": {"levels": [{"number": 1, "title": "a", "status": "passed", "comparison": {"worst": {"error": -1.0}}}]},
    "kernels": {"levels": [{"number": 1, "title": "a", "status": "passed"}],
                "parts": [{"name": "a", "engine": {"profiles": [{"name": "a", "kernels": -1}]}}]},
    "versions": {"levels": [{"number": 1, "title": "a", "status": "passed"}], "versions": {"a": 1}},
}  # fmt: skip
REPOSITORIES = ("a--b/c", "a..b/c", "a/b.git", "a./b", "a/b-", "a/" + "n" * 100, "../elsewhere", "a/b/c", "a/b@main")
CASES = [
    *(Case(10, "export", f"repository {name[:20]}", PROMISE, lambda work: None, name[:20],
           arguments=("--checkpoint", name, "--out", "{work}/out")) for name in REPOSITORIES),
    *(Case(10, "check", f"against {name}", PROMISE, at("given.json", written(content)), "given.json", more=("--against", "{work}/given.json"))
      for name, content in (JSONS | {name: json.dumps(RECORD | changed).encode() for name, changed in RECORDS.items()}).items()),
    *(Case(10, "compare", f"report {name}", PROMISE, at("given.json", written(content)), "given.json",
           arguments=("{work}/given.json", "{work}/given.json"))
      for name, content in (JSONS | {name: json.dumps(changed).encode() for name, changed in REPORTS.items()}).items()),
    *(Case(10, "golden", name, PROMISE, damage, "golden") for name, damage in GOLDEN.items()),
    *(Case(10, "golden", f"{file} {name}", PROMISE, at(f"golden/{file}", written(content)), file)
      for file in ("golden.json", "decoder.polygraphy.json") for name, content in JSONS.items()),
    *(Case(10, "convert", f"pickle {name}", PROMISE, at("checkpoint/model.bin", written(content)), "model.bin")
      for name, content in PICKLES.items()),
    *(Case(10, "export", name, PROMISE, at("checkpoint/config.json", damage)) for name, damage in CONFIGS.items()),
    *(Case(10, "export", f"config {name}", PROMISE, at("checkpoint/config.json", written(content)), "config.json")
      for name, content in JSONS.items()),
    *(Case(10, "export", f"header {name}", PROMISE, at("checkpoint/model.safetensors", damage)) for name, damage in HEADERS.items()),
    *(Case(10, "export", name, PROMISE, at(INDEX, damage)) for name, damage in INDEXES.items()),
    *(Case(10, stage, name, PROMISE, at(f"{folder_of(stage)}/model.onnx", damage), "model.onnx")
      for stage in (*GRAPH_STAGES, *CUTTERS) for name, damage in GRAPHS.items()),
    *(Case(10, stage, f"reference {name}", PROMISE, at(f"{folder_of(stage)}/model.onnx", damage))
      for stage in (*GRAPH_STAGES, *CUTTERS) for name, damage in REFERENCES.items()),
    *(Case(10, "surgery.join", f"{name}, the second", PROMISE, at("pair/model.onnx", damage), "model.onnx", arguments=SECOND)
      for name, damage in GRAPHS.items()),
    *(Case(10, "bundle", f"results {name}", PROMISE, at("bundled/results.npz", damage), "results.npz")
      for name, damage in {**RESULTS, **{f"about {name}": about(content) for name, content in JSONS.items()}}.items()),
    *(Case(10, "generate", name, PROMISE, at(file, damage), "library") for name, (file, damage) in LIBRARY.items()),
    *(Case(10, "convert", name, PROMISE, at("checkpoint/model.bin", written(content)), "model.bin") for name, content in JSONS.items()),
]  # fmt: skip
