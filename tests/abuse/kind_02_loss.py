"""Kind 2: results that would replace what somebody else has: inputs, other stages' results, foreign files."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.abuse.case import ARGUMENTS, CUTTERS, Case, folder_of

PROMISE = "nothing is replaced that the stage has not written itself"
READS = {"export": "checkpoint", **{stage: folder_of(stage) for stage in ("surgery", "build", "validate", *CUTTERS)}}
WRITES = {
    "export": "model.onnx", "surgery": "model.onnx", "build": "model.engine", "validate": "report.html", **dict.fromkeys(CUTTERS, "model.onnx"),
    "surgery.ranks": "joint.onnx",
}  # fmt: skip
NAMES = {"surgery.capacity": "surgery", "surgery.once": "surgery"}  # in its manifest


def taken(make: Callable[[Path], None]) -> Callable[[str, Path], None]:
    """Something that is in the place of the stage's first result."""

    def damage(stage: str, out: Path) -> None:
        out.mkdir()
        make(out / WRITES[stage])

    return damage


def manifest_of(content: object) -> Callable[[str, Path], None]:
    def damage(stage: str, out: Path) -> None:
        out.mkdir()
        text = content if isinstance(content, str) else json.dumps(content)
        (out / "manifest.json").write_text(text.replace("STAGE", NAMES.get(stage, stage)))

    return damage


def partial(make: Callable[[Path], None]) -> Callable[[str, Path], None]:
    def damage(stage: str, out: Path) -> None:
        out.mkdir()
        make(out / ".partial")

    return damage


def in_partial(name: str, make: Callable[[Path], None]) -> Callable[[str, Path], None]:
    return partial(lambda folder: (folder.mkdir(), make(folder / name)))


def links_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def hard_link(path: Path) -> None:
    os.link(path.parent.parent / "secret", path)


OTHERS = ("export", "surgery", "build", "validate", "validate.network", "nobody's")
OUTS: dict[str, Callable[[str, Path], None]] = {
    "another's file": taken(lambda path: path.write_text("mine")),
    "another's empty file": taken(lambda path: path.write_text("")),
    "another's folder": taken(os.mkdir),
    "a link to another's file": taken(links_to("../secret")),
    "a link to nothing": taken(links_to("nowhere")),
    "a name that an input has, too": taken(hard_link),
    "a FIFO": taken(os.mkfifo),
    **{f"results of {name}": manifest_of({"stage": name, "outputs": {}}) for name in OTHERS},
    "an app's manifest": manifest_of({"name": "an app", "icons": []}),
    "a manifest that is a list": manifest_of([]),
    "a manifest that is cut": manifest_of('{"stage": "STAGE", "outputs": {'),
    "a manifest that is empty": manifest_of(""),
    "a manifest without a stage": manifest_of({"outputs": {}}),
    "a file for a folder": lambda stage, out: out.write_text("mine"),
    "a FIFO for a folder": lambda stage, out: os.mkfifo(out),
    "a link to a file": lambda stage, out: out.symlink_to("secret"),
    "a link for .partial": partial(links_to("../library")),
    "a file for .partial": partial(lambda path: path.write_text("mine")),
    "a FIFO for .partial": partial(os.mkfifo),
    "a link for the lock": in_partial(".lock", links_to("../../secret")),
    "a FIFO for the lock": in_partial(".lock", os.mkfifo),
    "a folder for the lock": in_partial(".lock", os.mkdir),
    "a link for the list of what moves": in_partial(".moving.json", links_to("../../secret")),
    "another's interrupted move": in_partial(".moving.json", lambda path: path.write_text('{"stage": "x", "outputs": ["a"]}')),
}
FOLDERS = {  # the folder that the stage reads, by its names
    "its input's folder": lambda name: f"{{work}}/{name}",
    "its input's folder by a detour": lambda name: f"{{work}}/library/../{name}",
    "its input's folder with a dot": lambda name: f"{{work}}/{name}/.",
    "its input's folder by a link": lambda name: "{work}/link",
}


def damage(stage: str, name: str) -> Callable[[Path], None]:
    return lambda work: OUTS[name](stage, work / "out")


def link(stage: str) -> Callable[[Path], None]:
    return lambda work: (work / "link").symlink_to(READS[stage])


def to(stage: str, out: str) -> tuple[str, ...]:
    given = [word for word in ARGUMENTS[stage] if word not in ("--out", "{work}/out")]
    return (*given, "--out", out)


RESULTS = {  # what generate's --out must not replace: all that it reads, and what a manifest lists
    "prompts": "prompts.txt", "graph": "graphs/model.onnx", "weights": "graphs/model.data", "tokenizer": "library/tokenizer.json",
    "settings": "library/tokenizer_config.json", "generation": "library/generation_config.json",
}  # fmt: skip
FORMS = {  # and ways to write its name
    "": lambda name: f"{{work}}/{name}",
    " by a detour": lambda name: f"{{work}}/static/../{name}",
    " by a link to it": lambda name: "{work}/link",
    " by a link to its folder": lambda name: f"{{work}}/folder/{Path(name).name}",
}


def links(name: str) -> Callable[[Path], None]:
    def make(work: Path) -> None:
        (work / "link").symlink_to(name)
        (work / "folder").symlink_to(Path(name).parent)

    return make


THERE = {
    "another's file": lambda path: path.write_text("mine"), "another's empty file": lambda path: path.write_text(""),
    "a link to another's": links_to("../secret"), "a link to nothing": links_to("../nowhere"), "a link to itself": links_to("itself"),
    "a FIFO": os.mkfifo, "a folder": os.mkdir, "a second name": hard_link,
}  # fmt: skip
SAVE = ("{work}/pipeline", "--save-golden", "{work}/out")


def there(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        (work / "out").mkdir()
        make(work / "out" / name)

    return damage


NAMED = {  # files that options name: the command, its options
    "check": (("{work}/graphs/model.onnx",), ("--json", "--junit", "--save")),
    "compare": (("{work}/graphs/model.onnx", "{work}/static/model.onnx"), ("--json", "--junit")),
    "validate": (ARGUMENTS["validate"], ("--json", "--junit")),
    "golden": (ARGUMENTS["golden"], ("--json", "--junit")),
    "generate": (("{work}/graphs/model.onnx", "--checkpoint", "{work}/library", "--prompts", "{work}/prompts.txt"), ("--out",)),
}  # fmt: skip
FOREIGN = THERE | {
    "another's JSON": lambda path: path.write_text('{"model": "mine"}\n'),
    "another's XML": lambda path: path.write_text("<?xml version='1.0' encoding='utf-8'?>\n<testsuite name=\"pytest\" />\n"),
    "a link to a device": links_to("/dev/null"),
}
NOWHERE = {  # where no file can be written
    "no folder": "{work}/no/given", "a file for its folder": "{work}/secret/given", "a device": "/dev/null", "empty": "",
    "a folder of its own": "{work}/graphs", "the parent": "{work}/..", "a name that is too long": "{work}/" + "n" * 300,
}  # fmt: skip
PROMPTS = ("{work}/graphs/model.onnx", "--checkpoint", "{work}/library", "--prompts", "{work}/prompts.txt", "--max-tokens", "2")
CASES = [
    *(Case(2, stage, name, PROMISE, damage(stage, name), arguments=to(stage, "{work}/out"))
      for stage in READS for name in OUTS if name != f"results of {NAMES.get(stage, stage)}"),
    *(Case(2, stage, name, PROMISE, link(stage), arguments=to(stage, write(folder)))
      for stage, folder in READS.items() for name, write in FOLDERS.items()),
    *(Case(2, "generate", f"{what}{form}", PROMISE, links(name), "would be replaced", arguments=(*PROMPTS, "--out", write(name)))
      for what, name in RESULTS.items() for form, write in FORMS.items()),
    *(Case(2, "check", f"{option} over {what}{form}", PROMISE, links(name), "would be replaced",
           arguments=("{work}/graphs/model.onnx", option, write(name)))
      for option in ("--json", "--junit", "--save") for what, name in RESULTS.items() if name.startswith("graphs")
      for form, write in FORMS.items()),
    *(Case(2, stage, f"{what} for {option}", PROMISE, there("given", make), "given", arguments=(*arguments, option, "{work}/out/given"))
      for stage, (arguments, options) in NAMED.items() for option in options for what, make in FOREIGN.items()),
    *(Case(2, stage, f"{option} to {what}", PROMISE, lambda work: None, arguments=(*arguments, option, name))
      for stage, (arguments, options) in NAMED.items() for option in options for what, name in NOWHERE.items()),
    *(Case(2, stage, "one file for two options", PROMISE, lambda work: None, "is named by",
           arguments=(*arguments, *(word for option in options for word in (option, "{work}/given"))))
      for stage, (arguments, options) in NAMED.items() if len(options) > 1),
    *(Case(2, stage, f"{option} over {name} in --out", PROMISE, lambda work: None, "lies in --out",
           arguments=(*NAMED[stage][0], "--out", "{work}/out", option, f"{{work}}/out/{name}"))
      for stage in ("validate", "check") for option in ("--json", "--junit") for name in ("report.json", "manifest.json", "network.json")),
    *(Case(2, "convert", f"{what} for {name}", PROMISE, there(name, make))
      for name in ("model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors")
      for what, make in THERE.items()),
    *(Case(2, "golden", f"{what} for {name}{' by force' * bool(force)}", PROMISE, there(name, make), arguments=(*SAVE, *force))
      for name in ("golden.json", "decoder.polygraphy.json", "manifest.json") for what, make in THERE.items()
      for force in ((), ("--force",))),
]  # fmt: skip
