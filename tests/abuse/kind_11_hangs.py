"""Kind 11: what would make a stage wait, or take memory, without end: FIFOs and devices in a file's place, templates that loop."""

from tests.abuse.case import DONE, GRAPH_STAGES, Case
from tests.abuse.damages import IN_ITS_PLACE, at, instead, keys, written

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
    "many loops": "{% for a in range(99) %}" * 30 + "{% endfor %}" * 30,
}


def place(folder: str, names: tuple[str, ...]) -> dict:
    return {
        f"{kind} for {name}": at(f"{folder}/{name}", instead(make))
        for name in names for kind, make in IN_ITS_PLACE.items()
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
    *(Case(11, stage, name, PROMISE, damage, "graphs", seconds=90) for stage in GRAPH_STAGES
      for name, damage in place("graphs", ("model.onnx", "model.data")).items() if name != "a terabyte for model.data"),
    *(Case(11, stage, name, PROMISE, damage, expected=(*DONE.get(stage, (0,)), 2), seconds=120) for stage in GRAPH_STAGES
      for name, damage in place("graphs", ("manifest.json",)).items()),
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
    *(Case(11, "convert", f"pickle of {name}", PROMISE, at("checkpoint/model.bin", written(content)), "model.bin", seconds=120)
      for name, content in PICKLES.items()),
    *(Case(11, "convert", name, PROMISE, damage, "model.bin") for name, damage in place("checkpoint", ("model.bin",)).items()),
]  # fmt: skip
