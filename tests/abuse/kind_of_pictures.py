"""Every kind, of the stages that read or write pictures: export of models of several networks, generate's pictures and masks, and
convert of a file that holds such a model."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.abuse.case import Case
from tests.abuse.damaged_pictures import (
    INDEXES,
    LARGE,
    LINKED,
    MASK_CONFIGS,
    NETWORKS,
    NO_JSONS,
    OTHER_DRAWING,
    OTHER_MASKING,
    PICTURES,
    PREPROCESSORS,
    SCHEDULERS,
    SINGLE,
)  # fmt: skip
from tests.abuse.damages import IN_ITS_PLACE, Damage, at, instead, written
from tests.abuse.good_pictures import MASKING
from tests.abuse.kind_05_numbers import NO_COUNTS, NO_NUMBERS
from tests.abuse.kind_10_values import GRAPHS, JSONS

READ = "only what belongs to the model is read, and only what the command line names is written"
LOST = "nothing is replaced that generate has not written itself"
NUMBER = "a value that cannot be used is refused, and the line names its option"
LINE = "bad input is one line with the file's name, and exit status 2"
HANG = "a file is regular and has a size limit: one line, at once"
PROMPTS = ("{work}/drawn", "--checkpoint", "{work}/sd", "--prompts", "{work}/prompts.jsonl", "--control", "{work}/given.png",
           "--picture", "{work}/out/made.png", "--steps", "2")  # fmt: skip


def leads(name: str, target: str) -> Damage:
    """A link in the place of a file or folder; what was there lies outside, where the link may lead to it."""

    def damage(work: Path) -> None:
        place, outside = work / "sd" / name, work / "outside"
        os.rename(place, outside)
        place.symlink_to({"../secret": outside, "itself": place.name}.get(target, target))

    return damage


def asked(**line: object) -> Damage:
    return lambda work: (work / "prompts.jsonl").write_text(json.dumps({"prompt": "a circle", **line}) + "\n")


NAMES = {
    "above": "../secret.png", "above, by a detour": "out/../../secret.png", "absolute": "/etc/hostname",
    "of the system": "/dev/zero",
    "a link out": "link.png", "by a folder's link": "folder/made.png", "an end of text": "a\0.png", "its own folder": "..",
    "a home": "/root/x.png",
    "absolute picture": "/tmp/suture-abuse.png", "two above": "../../made.png",
}  # fmt: skip


def names(key: str, name: str) -> Damage:
    def damage(work: Path) -> None:
        for folder in (work, work / "out"):
            (folder / "link.png").symlink_to("/etc/hostname")
            (folder / "folder").symlink_to("/tmp")
        asked(**{key: name})(work)

    return damage


def found(make: Callable[[Path], object]) -> Damage:
    return lambda work: make(work / "out" / "made.png")


THERE = {
    "another's file": lambda path: path.write_text("mine"), "another's empty file": lambda path: path.write_text(""),
    "another's picture": lambda path: Image.new("RGB", (2, 2)).save(path),
    "a link to another's": lambda path: path.symlink_to("../secret.png"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"), "a link to itself": lambda path: path.symlink_to("made.png"),
    "a FIFO": os.mkfifo, "a folder": os.mkdir, "a second name": lambda path: os.link(path.parents[1] / "secret.png", path),
    "a device": lambda path: path.symlink_to("/dev/null"),
}  # fmt: skip
PLACES = {
    "no folder": "{work}/no/made.png", "a file for its folder": "{work}/given.png/made.png", "no PNG": "{work}/out/made.jpg",
    "no suffix": "{work}/out/made",
    "empty": "", "the parent": "{work}/..", "a name that is too long": "{work}/out/" + "n" * 300 + ".png",
    "what is read": "{work}/given.png",
    "a folder of its own": "{work}/out", "a device": "/dev/null", "a link's folder": "{work}/link/made.png",
}  # fmt: skip
CONTROLLED = (
    "{work}/drawn",
    "--checkpoint",
    "{work}/sd",
    "--prompt",
    "a circle",
    "--control",
    "{work}/given.png",
    "--steps",
    "2",
)
POINTED = ("{work}/masked", "--checkpoint", "{work}/sam", "--picture", "{work}/given.png", "--point", "3,4", "--runtime", "cpu")
MASKED = ("{work}/masked", "--checkpoint", "{work}/sam", "--picture", "{work}/given.png", "--mask", "{work}/out/made.png")
UNSET = ("{work}/drawn", "--checkpoint", "{work}/sd", "--prompt", "a circle", "--control", "{work}/given.png", "--picture",
         "{work}/out/made.png")  # fmt: skip
NO_POINTS = ("", ",", "3", "3,4,5", "a,b", "nan,1", "inf,1", "-1,2", "1e2,3", "3, 4", "3;4", "24,0", "0,16", "1000000,1",
    "\N{INFINITY},1", "9" * 400 + ",1",
             "0x3,4", "3,4\n")  # fmt: skip
NO_BOXES = (
    "",
    "1,2,3",
    "1,2,3,4,5",
    "a,b,c,d",
    "nan,1,2,3",
    "5,5,5,9",
    "9,1,3,8",
    "1,9,3,2",
    "0,0,25,16",
    "0,0,24,17",
    "-1,0,4,4",
    "inf,0,4,4",
)
NO_SIZES = (
    "",
    "x",
    "16",
    "16x",
    "x16",
    "-16x16",
    "0x16",
    "15x16",
    "16x18",
    "99999x16",
    "1e2x16",
    "16x16x16",
    "nanx16",
    "16 x16",
    "16*16",
    "32x32",
)


def of_folder(folder: str, names: tuple[str, ...]) -> dict[str, Damage]:
    return {
        f"{kind} for {name}": at(f"{folder}/{name}", instead(make)) for kind, make in IN_ITS_PLACE.items() for name in names
    }


SD = ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/config.json")
USED = ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "tokenizer/merges.txt", "tokenizer/chat_template.jinja")
CASES = [
    *(Case(1, "export.networks", name, READ, leads(*link), "sd") for name, link in LINKED.items()
      if "scheduler" not in name and "tokenizer" not in name),
    *(Case(1, "generate.picture", name, READ, leads(*link), "sd") for name,
    link in LINKED.items() if "safetensors" not in name),
    *(Case(1, "generate.picture", f"{key} {what}", READ, names(key, name), "prompts.jsonl", arguments=PROMPTS)
      for key in ("control", "picture") for what, name in NAMES.items()),
    *(Case(2, stage, name, LOST, found(make), "made.png") for stage in ("generate.picture", "generate.mask") for name,
    make in THERE.items()),
    *(Case(2, stage, f"to {name}", LOST, lambda work: (work / "link").symlink_to("no"), arguments=(*given, option, place))
      for stage, given,
      option in (("generate.picture", CONTROLLED, "--picture"), ("generate.mask", POINTED, "--mask")) for name,
      place in PLACES.items()),
    *(Case(5, "generate.picture", f"{option} {value[:24]!r}", NUMBER, lambda work: None, option, arguments=UNSET,
    more=(f"{option}={value}",))
      for option, values in {"--steps": (*NO_COUNTS, "1001"), "--guidance": (*NO_NUMBERS, "0", "-1", "1e6"), "--size": NO_SIZES,
                             "--seed": ("-1", "nan", str(2**64))}.items() for value in values),
    *(Case(5, "generate.mask", f"{option} {value[:24]!r}", NUMBER, lambda work: None, option, arguments=MASKED,
           more=(f"{option}={value}", *(("--point", "3,4") if option == "--beside" else ())))
      for option, values in {"--point": NO_POINTS, "--beside": NO_POINTS, "--box": NO_BOXES}.items() for value in values),
    *(Case(10, stage, f"picture {name}", LINE, at("given.png", damage), "given.png") for stage in ("generate.picture",
    "generate.mask")
      for name, damage in PICTURES.items()),
    *(Case(10, "generate.picture", f"scheduler {name}", LINE, at("sd/scheduler/scheduler_config.json", damage), "scheduler")
      for name, damage in SCHEDULERS.items()),
    *(Case(10, "generate.picture", f"{file} {name}", LINE, at(f"sd/{file}", written(content)), "sd")
      for file in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "model_index.json") for name,
      content in NO_JSONS.items()),
    *(Case(10, "generate.picture", name, LINE, damage) for name, damage in OTHER_DRAWING.items()),
    *(Case(10, "generate.picture", f"{part} {name}", LINE, at(f"drawn/{part}/export/model.onnx", damage), "model.onnx")
      for part in ("unet",) for name, damage in GRAPHS.items()),
    *(Case(10, "generate.picture", f"no {name}", LINE, lambda work, name=name: os.rename(work / name, work / "gone"))
      for name in ("drawn/unet", "drawn/parts.json", "sd/tokenizer", "sd/scheduler", "sd/unet/config.json", "sd/vae",
      "given.png", "drawn/unet/export/model.onnx")),
    *(Case(10, "generate.picture", f"line {name}", LINE, asked(**line), "prompts.jsonl", arguments=PROMPTS) for name, line in {
        "prompt number": {"prompt": 5}, "prompt list": {"prompt": []}, "seed negative": {"seed": -1},
        "seed text": {"seed": "1"}, "seed beyond": {"seed": 2**64},
        "seed float": {"seed": 1.0}, "negative number": {"negative": 1}, "control list": {"control": []},
        "picture number": {"picture": 3},
        "lone surrogate": {"prompt": "\ud800"}, "picture surrogate": {"picture": "\ud800.png"},
        "no PNG": {"picture": "a.jpg", "seed": -1}}.items()),
    *(Case(10, "generate.mask", f"preprocessor {name}", LINE, at("sam/preprocessor_config.json", damage),
    "preprocessor_config.json")
      for name, damage in PREPROCESSORS.items()),
    *(Case(10, "generate.mask", f"preprocessor {name}", LINE, at("sam/preprocessor_config.json", written(content)),
    "preprocessor_config.json")
      for name, content in JSONS.items()),
    *(Case(10, "generate.mask", name, LINE, damage) for name, damage in OTHER_MASKING.items()),
    *(Case(10, "generate.mask", f"{part} {name}", LINE, at(f"masked/{part}/export/model.onnx", damage), "model.onnx")
      for part in MASKING for name, damage in GRAPHS.items()),
    *(Case(10, "export.networks", f"unet {name}", LINE, at("sd/unet/config.json", damage)) for name,
    damage in NETWORKS.items()),
    *(Case(10, "export.networks", f"index {name}", LINE, at("sd/model_index.json", damage), "model_index.json") for name,
    damage in INDEXES.items()),
    *(Case(10, "export.networks", f"{file} {name}", LINE, at(f"sd/{file}", written(content)), file.split("/")[-1])
      for file in ("model_index.json", "unet/config.json", "vae/config.json") for name, content in JSONS.items()),
    *(Case(10, "export.networks", f"no {name}", LINE, lambda work, name=name: os.rename(work / "sd" / name, work / "gone"))
      for name in ("unet", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae", "text_encoder",
      "text_encoder/model.safetensors")),
    *(Case(10, "export.masks", name, LINE, at("sam/config.json", damage)) for name, damage in MASK_CONFIGS.items()),
    *(Case(10, "export.masks", f"config {name}", LINE, at("sam/config.json", written(content)), "config.json") for name,
    content in JSONS.items()),
    *(Case(10, "convert.like", name, LINE, damage) for name, damage in SINGLE.items()),
    *(Case(11, stage, name, HANG, at("given.png", damage), "given.png") for stage in ("generate.picture",
    "generate.mask") for name, damage in LARGE.items()),
    *(Case(11, "generate.picture", name, HANG, damage, "sd") for name, damage in of_folder("sd", USED).items()),
    *(Case(11, "generate.picture", f"{name} for prompts", HANG, at("prompts.jsonl", instead(make)), "prompts.jsonl",
    arguments=PROMPTS)
      for name, make in IN_ITS_PLACE.items()),
    *(Case(11, "generate.mask", name, HANG, damage, "masked") for name, damage in of_folder(
        "masked", ("image_encoder/export/model.onnx", "mask_decoder/export/model.onnx")).items()),
    *(Case(11, "export.networks", name, HANG, damage, "sd") for name, damage in of_folder("sd", SD).items()),
    *(Case(11, "export.masks", name, HANG, damage, "sam") for name,
    damage in of_folder("sam", ("config.json", "model.safetensors",
      "model.safetensors.index.json")).items()),
    *(Case(11, "convert.like", name, HANG, damage) for name,
    damage in of_folder(".", ("single.ckpt", "sd/unet/config.json", "sd/vae/config.json")).items()),
]  # fmt: skip
