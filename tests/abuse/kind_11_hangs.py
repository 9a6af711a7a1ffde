"""Kind 11: what would make a stage wait, or take memory, without end: FIFOs and devices in a file's place, templates that loop."""

from tests.abuse.case import GRAPH_STAGES, Case
from tests.abuse.damages import IN_ITS_PLACE, at, instead, keys

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


CASES = [
    *(Case(11, "export", name, PROMISE, damage, "checkpoint") for name, damage in place("checkpoint", CHECKPOINT).items()),
    *(Case(11, stage, name, PROMISE, damage, "graphs", seconds=90) for stage in GRAPH_STAGES
      for name, damage in place("graphs", ("model.onnx", "model.data")).items() if name != "a terabyte for model.data"),
    *(Case(11, stage, name, PROMISE, damage, expected=(0, 2), seconds=120) for stage in GRAPH_STAGES  # as if there were none
      for name, damage in place("graphs", ("manifest.json",)).items()),
    *(Case(11, "generate", name, PROMISE, damage, "library") for name, damage in place("library", LIBRARY).items()
      if not name.startswith("link to nothing")),
    *(Case(11, "generate", f"template {name}", PROMISE, at("library/tokenizer_config.json", keys(chat_template=template)),
           "its chat template cannot be rendered", arguments=CHAT) for name, template in TEMPLATES.items()),
    *(Case(11, "convert", name, PROMISE, damage, "model.bin") for name, damage in place("checkpoint", ("model.bin",)).items()),
]  # fmt: skip
