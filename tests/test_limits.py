"""Each limit on what a file can cost, at a small scale: it is lowered, and then what is within it is taken, and what is beyond it is
one line."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from suture.core import arrays, onnx_checks, read_pictures, reader, safetensors_header, weights
from suture.core.errors import UserError
from suture.models import library_tokenizer, pickles, template
from suture.models.config import check_config

GRAPH = '<ir_version: 10, opset_import: ["": 18]> g (float[n] x) => (float[n] y) {{ {} }}'


def graph(file: Path, nodes: int) -> None:
    chain = " ".join(f"t{i} = Neg({f't{i - 1}' if i else 'x'})" for i in range(nodes - 1))
    onnx.save(onnx.parser.parse_model(GRAPH.format(f"{chain} y = Neg({f't{nodes - 2}' if nodes > 1 else 'x'})")), file)


def nested(file: Path, deep: int) -> None:
    """An If in an If."""
    inner = "b = Neg(x)"
    for level in range(deep):
        branches = f"then_branch = a{level} () => (float[n] b) {{ {inner} }}, else_branch = e{level} () => (float[n] d) {{ d = Neg(x) }}"
        inner = f"{'y' if level == deep - 1 else 'b'} = If (yes) <{branches}>"
    text = GRAPH.format(inner).replace("(float[n] x)", "(float[n] x, bool yes)")
    onnx.save(onnx.parser.parse_model(text), file)


def weights_file(file: Path, names: int) -> None:
    header = {f"w{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(names)}
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(names))


def picture(file: Path, side: int) -> None:
    Image.new("RGB", (side, side)).save(file, "PNG")


def archive(file: Path, size: int) -> None:
    with open(file, "wb") as out:
        np.savez_compressed(out, zeros=np.zeros(size, np.uint8))


def pickled(file: Path, names: int) -> None:
    """As many names of one storage."""
    tensor = torch.zeros(1000)
    torch.save({f"w{i}": tensor for i in range(names)}, file)


def converted(file: Path) -> None:
    found, _ = pickles.load(file)
    pickles.write(found, file, file.stat().st_size, file.parent, "model", 1 << 30)


def settings(file: Path, size: int) -> None:
    file.write_text(json.dumps({"a": "b" * size}))


def tokenizer(file: Path) -> None:
    library_tokenizer.check_files(file.parent)


LIMITS: dict[str, tuple[object, str, int, str, Callable, Callable, int, int, str]] = {
    # where it is, its name, what it becomes; a file's name, what makes it, what reads it; the size within, and beyond; words
    "an ONNX file": (weights, "MODEL_LIMIT", 2000, "m.onnx", graph, weights.load_graph, 3, 300, "has more than 2,000 bytes"),
    "nodes": (onnx_checks, "MOST_NODES", 5, "m.onnx", graph, weights.load_graph, 5, 6, "more than 5 nodes"),
    "subgraphs": (onnx_checks, "DEEPEST", 3, "m.onnx", nested, weights.load_graph, 3, 5, "subgraphs more than 3 deep"),
    "a safetensors header": (safetensors_header, "HEADER_LIMIT", 200, "m.safetensors", weights_file, safetensors_header.read_header,
    1, 9, "is not a safetensors file"),
    "a picture": (read_pictures, "MOST_PIXELS", 100, "p.png", picture, read_pictures.read_picture, 10, 11, "11x11 pixels"),
    "arrays": (arrays, "LIMIT", 1000, "a.npz", archive, lambda file: arrays.read_npz(file, "file", "x"), 500, 1000,
    "bytes of arrays"),
    "copies of a pickle": (pickles, "MOST_COPIES", 2, "p.bin", pickled, converted, 1, 40, "more than 2 times"),
    "a tokenizer's file": (reader, "JSON_LIMIT", 1000, "tokenizer.json", settings, tokenizer, 10, 2000,
    "has more than 1,000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("what", LIMITS)
def test_what_is_beyond_a_limit_is_one_line_and_what_is_within_is_taken(what, tmp_path, monkeypatch):
    place, name, lowered, file, make, read, within, beyond, words = LIMITS[what]
    monkeypatch.setattr(place, name, lowered)
    file = tmp_path / file
    make(file, within)
    read(file)
    for made in tmp_path.glob("model*"):
        made.unlink()
    make(file, beyond)
    with pytest.raises(UserError, match=words) as refused:
        read(file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("content", "within", "words"), [
    (b'{"a": 1}', b'{}', "has more than 7 bytes"),
    (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", None, "nested too deep"),
], ids=["bytes", "depth"])  # fmt: skip
def test_json_has_limits_of_size_and_depth(content, within, words, tmp_path):
    file = tmp_path / "a.json"
    if within is not None:
        file.write_bytes(within)
        reader.read_json(file, limit=7)
    file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        reader.read_json(file, limit=7 if within is not None else reader.JSON_LIMIT)


@pytest.mark.parametrize(("key", "most"), [("num_hidden_layers", 1000), ("hidden_size", 1_000_000), ("vocab_size", 10_000_000)])
def test_what_a_config_lays_out_is_bounded(key, most, tmp_path):
    check_config({key: most}, tmp_path / "config.json")
    with pytest.raises(UserError, match=f"'{key}' is {most + 1}"):
        check_config({key: most + 1}, tmp_path / "config.json")


@pytest.mark.seconds
@pytest.mark.parametrize(("text", "words"), [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 0.5 seconds"),
    ("{{ 'a' * 10 ** 10 }}", ""),
], ids=["time", "memory"])  # fmt: skip
def test_a_template_has_limits_of_time_and_memory(text, words, tmp_path, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.5)
    with pytest.raises(UserError, match=f"its chat template cannot be rendered .*{words}"):
        template.Template(text, {}, tmp_path).render([{"role": "user", "content": "a"}])


@pytest.mark.seconds
def test_a_pickle_that_takes_long_to_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "LOADING", 0)
    pickled(tmp_path / "p.bin", 1)
    with pytest.raises(UserError, match="takes more than 0 seconds to read"):
        pickles.convert(tmp_path / "p.bin", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_array_that_says_to_be_larger_than_memory_names_its_file(tmp_path):
    """The archive's own sizes are small: its limit does not see it."""
    file = tmp_path / "a.npz"
    head = b"\x93NUMPY\x01\x00"
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a.npy", head + struct.pack("<H", len(text)) + text)
    with pytest.raises(UserError, match=str(file)):
        arrays.read_npz(file, "file of arrays", "write it again")
