"""Kind 11: what would make a stage wait, or take memory, without end: FIFOs and devices in a file's place, templates that loop."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np

from tests.abuse.case import CUTTERS, DONE, GRAPH_STAGES, SECOND, Case, folder_of
from tests.abuse.damages import IN_ITS_PLACE, Damage, at, instead, keys, written

PROMISE = "a file is regular and has a size limit, a template its limits: one line, at once"
CHAT = ("{work}/graphs/model.onnx", "--checkpoint", "{work}/library", "--chat", "--prompt", "ab", "--max-tokens", "2")
CHECKPOINT = ("config.json", "model.safetensors", "model.safetensors.index.json")
LIBRARY = ("tokenizer.json", "tokenizer_config.json")
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "loops": ENDLESS,
    "loops in a macro": "{% macro m() %}" + ENDLESS + "{% endmacro %}{{ m() }}",
    "calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "long string": "{{ 'a' * 10 ** 10 }}",
    "long power": "{{ 10 ** (10 ** 8) }}",
    "much text": "{% for a in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "doubles": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "long list": "{{ ([0] * 10 ** 9) | length }}",
    "centered": "{{ 'a' | center(10 ** 10) }}",
    "formatted": "{{ '%10000000000d' % 1 }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "counts to 10**12": "{{ range(10 ** 12) | list }}",
    "padded": "{{ 'a'.ljust(10 ** 10) }}",
    "zeros": "{{ 'a'.zfill(10 ** 10) }}",
    "power of a power": "{{ 2 ** (2 ** (2 ** (2 ** (2 ** 2)))) }}",
    "much latin": "{{ lipsum(n=10 ** 7) }}",
    "tuples": "{{ ((1,) * 10 ** 9) | join }}",
    "joined": "{{ (['a' * 9999] * 99999) | join('b' * 9999) }}",
    "replaced": "{{ ('a' * 9999).replace('a', 'a' * 9999).replace('a', 'a' * 9999) }}",
    "slices": "{{ range(99999) | slice(999999999) | list }}",
    "batches": "{{ range(9) | batch(10 ** 9, 'x') | list }}",
    "loops on itself": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a block in itself": "{% block b %}{{ self.b() }}{% endblock %}",
    "many loops": "{% for a in range(99) %}" * 30 + "{% endfor %}" * 30,
}


def place(folder: str, names: tuple[str, ...]) -> dict:
    return {
        f"{kind} for {name}": at(f"{folder}/{name}", instead(make))
        for name in names for kind, make in IN_ITS_PLACE.items()
    }  # fmt: skip


def archive(name: str, size: int, content: bytes = b"") -> Damage:
    """A .npz file whose array says that it has `size` bytes of float32, and holds these."""

    def damage(path: Path) -> None:
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (size // 4,)})
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(name, head.getvalue() + content)

    return damage


def raw(header: bytes) -> Damage:
    """A .npz file whose array begins with these bytes."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("about.npy", header)

    return damage


def described(text: str) -> Damage:
    encoded = text.encode()
    return raw(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(encoded)) + encoded)


def declared(size: int) -> Damage:
    """A .npz file whose directory says that its entry has `size` bytes."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("about.npy", b"x" * 100)
        content = path.read_bytes()
        place = content.rindex(b"PK\x01\x02") + 24
        path.write_bytes(content[:place] + struct.pack("<I", size) + content[place + 4 :])

    return damage


def many_names(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for number in range(20_000):
            file.writestr(f"{number}.npy", b"")


ARRAYS = {
    "array of a terabyte": archive("about.npy", 1 << 40), "array of 2**60 bytes": archive("about.npy", 1 << 60),
    "array of 8 GB": archive("0/0/logits.npy", 1 << 33, bytes(1 << 20)), "declares 4 GB": declared((1 << 32) - 2),
    "a header of 4 GB": raw(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"), "an array in an array": described("[" * 5000 + "]" * 5000),
    "text of 2 GB": described("{'descr': '<U500000000', 'fortran_order': False, 'shape': (), }"),
    "a dimension of 2**62": described("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 0), }"),
    "a negative dimension": described("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }"),
    "a header that computes": described("{'descr': '<f4', 'fortran_order': False, 'shape': (9 ** 9 ** 9,), }"),
    "a record of many fields": described("{'descr': [" + ",".join(f"('f{i}', '<f4')" for i in range(20000))
    + "], 'fortran_order': False, 'shape': (1,), }"),
    "many names": many_names, "a name outside": archive("../../secret.npy", 4, bytes(4)),
}  # fmt: skip
PICKLES = {  # what makes an unpickler take memory, or go on
    "lists in lists": b"\x80\x02" + b"]" * 1_000_000 + b".", "tuples in tuples": b"\x80\x02" + b")" + b"\x85" * 1_000_000 + b".",
    "marks": b"\x80\x02" + b"(" * 5_000_000 + b".", "copies": b"\x80\x02]" + b"2" * 5_000_000 + b".",
    "text of 2**62 bytes": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little"), "bytes of 2**62": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little"),
    "bytearray of 2**62": b"\x80\x05\x96" + (2**62).to_bytes(8, "little"), "frame of 2**62": b"\x80\x04\x95" + (2**62).to_bytes(8, "little"),
    "number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f", "memo of 2**32": b"\x80\x02]r\xff\xff\xff\xff.",
    "doubling": b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40)) + b".",
    "a line without end": b"cos" + b"a" * 5_000_000, "zeros": bytes(10_000_000), "nothing to pop": b"\x80\x02" + b"0" * 1000 + b".",
}  # fmt: skip
CASES = [  # a manifest that is none of a stage's counts as none
    *(Case(11, "export", name, PROMISE, damage, "checkpoint") for name, damage in place("checkpoint", CHECKPOINT).items()),
    *(Case(11, stage, name, PROMISE, damage, folder_of(stage), seconds=90) for stage in (*GRAPH_STAGES, *CUTTERS)
      for name, damage in place(folder_of(stage), ("model.onnx", "model.data")).items() if name != "a terabyte for model.data"),
    *(Case(11, stage, name, PROMISE, damage, expected=(*DONE.get(stage, (0,)), 2), seconds=120) for stage in (*GRAPH_STAGES, *CUTTERS)
      for name, damage in place(folder_of(stage), ("manifest.json",)).items()),
    *(Case(11, "surgery.join", f"{name}, the second", PROMISE, damage, "pair", arguments=SECOND)
      for name, damage in place("pair", ("model.onnx",)).items()),
    *(Case(11, "bundle", name, PROMISE, damage, "results.npz")
      for name, damage in place("bundled", ("results.npz",)).items()),
    *(Case(11, "bundle", name, PROMISE, at("bundled/results.npz", damage), "results.npz")
      for name, damage in ARRAYS.items()),
    *(Case(11, "generate", name, PROMISE, damage, "library") for name, damage in place("library", LIBRARY).items()
      if not name.startswith("link to nothing")),
    *(Case(11, "generate", f"template {name}", PROMISE, at("library/tokenizer_config.json", keys(chat_template=template)),
           "its chat template cannot be rendered", arguments=CHAT) for name, template in TEMPLATES.items()),
    *(Case(11, "golden", name, PROMISE, damage, "golden") for name, damage in
      place("golden", ("golden.json", "decoder.polygraphy.json")).items()),
    *(Case(11, "golden", name, PROMISE, damage, expected=(0, 2)) for name, damage in place("golden", ("manifest.json",)).items()),
    *(Case(11, "check", f"{kind} for {option}", PROMISE, lambda work, make=make: make(work / "given"), "given", more=(option, "{work}/given"))
      for option in ("--inputs", "--reference", "--against", "--plugin") for kind, make in IN_ITS_PLACE.items()
      if (option, kind) != ("--plugin", "a terabyte")),
    *(Case(11, "convert", f"pickle of {name}", PROMISE, at("checkpoint/model.bin", written(content)), "model.bin", seconds=120,
           quick=name != "a line without end") for name, content in PICKLES.items()),
    *(Case(11, "convert", name, PROMISE, damage, "model.bin") for name, damage in place("checkpoint", ("model.bin",)).items()),
]  # fmt: skip
