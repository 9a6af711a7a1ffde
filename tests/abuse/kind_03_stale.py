"""Kind 3: whatever was changed after a run, the next one either runs again, or what it calls up to date is true."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import onnx

from tests.abuse.case import FINISHED, NO_TRACE, Case, untrue
from tests.abuse.damages import at, keys

PROMISE = "results are up to date by the content of all that was read and written, and by nothing else"
UP_TO_DATE = "up to date"


def flipped(name: str, share: float) -> Callable[[Path], None]:
    """A bit of the file, at this share of its length; size and times stay."""

    def damage(work: Path) -> None:
        path = work / name
        content, times = bytearray(path.read_bytes()), path.stat()
        content[min(int(share * len(content)), len(content) - 1)] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    return damage


def replaced(name: str) -> Callable[[Path], None]:
    """Another file of the same size and times, as cp -p and mv leave it."""

    def damage(work: Path) -> None:
        path = work / name
        content, times = path.read_bytes(), path.stat()
        half = len(content) // 2
        (work / "other").write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
        os.utime(work / "other", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.replace(work / "other", path)

    return damage


def other_graph(name: str) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        model = onnx.load(work / name, load_external_data=False)
        model.doc_string = "another"
        onnx.save(model, work / name)

    return damage


def clock(shift: float, *names: str) -> Callable[[Path], None]:
    """All that lies there is of another time."""

    def damage(work: Path) -> None:
        for path in [each for name in names for each in (work / name).rglob("*")]:
            os.utime(path, times=(time.time() + shift, time.time() + shift))

    return damage


def rewritten(name: str) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        content = (work / name).read_bytes()
        (work / name).unlink()
        (work / name).write_bytes(content)

    return damage


def gone(name: str) -> Callable[[Path], None]:
    return lambda work: (work / name).unlink()


def shorter(name: str) -> Callable[[Path], None]:
    return lambda work: os.truncate(work / name, (work / name).stat().st_size // 2)


def longer(name: str) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        with open(work / name, "ab") as file:
            file.write(b" ")

    return damage


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        path = work / "out" / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def anothers_hash(content: dict) -> None:
    for entry in content["content"].values():
        entry["sha256"] = "0" * 64


def each(names: tuple[str, ...], content: bytes | None) -> Callable[[Path], None]:
    """All results hold this; or, for None, each what the next one held."""

    def damage(work: Path) -> None:
        held = [(work / "out" / name).read_bytes() for name in names]
        for name, other in zip(names, [*held[1:], held[0][:-1]]):
            (work / "out" / name).write_bytes(other if content is None else content)

    return damage


def other_config(name: str) -> Callable[[Path], None]:
    return at(name, keys(comment="another"))


RESULTS = {
    "export": ("model.onnx", "model.safetensors"), "surgery.join": ("model.onnx",),
    "surgery.once": ("model.onnx", "once.onnx", "report.json"),
    "surgery": ("model.onnx", "model.trt.onnx", "report.json", "model.data"), "build": ("model.engine", "engine.json", "kernels.json"),
    "validate": ("report.json", "report.html", "summary.md"), "surgery.capacity": ("model.onnx", "model.trt.onnx", "report.json"),
    "surgery.ranks": ("joint.onnx", "rank0.onnx", "rank1.trt.onnx", "report.json"),
}  # fmt: skip
INPUTS = {
    "export": ("checkpoint/config.json", "checkpoint/model.safetensors"),
    "surgery.join": ("pair/second.onnx", "pair/model.data"), "surgery.once": ("pair/model.onnx", "pair/model.data"),
    "surgery": ("graphs/model.onnx", "graphs/model.data"), "build": ("graphs/model.onnx", "graphs/model.data"),
    "validate": ("graphs/model.onnx", "graphs/model.data"), "surgery.capacity": ("static/model.onnx", "static/model.data"),
    "surgery.ranks": ("static/model.onnx", "static/model.data"),
}  # fmt: skip
OPTIONS = {
    "export": ("--dtype=float16", "--weights=reference"), "surgery.join": ("--keep=h",), "surgery.once": ("--skip=swish",),
    "surgery": ("--logits=last", "--skip=swish"), "build": ("--max-batch=2", "--profiles=one", "--compute-capability=8.9"),
    "validate": ("--seed=3", "--tolerance=0.5"), "surgery.capacity": (), "surgery.ranks": (),
}  # fmt: skip
STALE = {  # by stage: name, damage
    stage: {
        **{f"weights flipped at {share}": flipped(INPUTS[stage][-1], share) for share in (0.01, 0.3, 0.5, 0.7, 0.95, 1)},
        "weights replaced": replaced(INPUTS[stage][-1]),
        "graph changed": (other_config if stage == "export" else other_graph)(INPUTS[stage][0]),
        **{f"{name} {how.__name__}": how(f"out/{name}") for name in names for how in (gone, shorter, longer, other_bit)},
        "results emptied": each(RESULTS[stage], b""),
        "results swapped": each(RESULTS[stage], None),
        "manifest without one hash": manifest(lambda content: content["content"].popitem()),
        "manifest with sizes alone": manifest(lambda content: [entry.pop("sha256") for entry in content["content"].values()]),
        "manifest of another Python": manifest(lambda content: content["versions"].update(python="2.7")),
        "manifest without hashes": manifest(lambda content: content.pop("content")),
        "manifest with other hashes": manifest(anothers_hash),
        "manifest of other options": manifest(lambda content: content["options"].update(other=1)),
        "manifest of other code": manifest(lambda content: content["versions"].update(code="0")),
        "manifest of other inputs": manifest(lambda content: content["inputs"].clear()),
        "manifest without results": manifest(lambda content: content["outputs"].clear()),
    }
    for other_bit in [lambda name: flipped(name, 0.5)] for stage, names in RESULTS.items()
}  # fmt: skip
SAME = {
    "untouched": lambda work: None,
    "clock an hour back": clock(-3600, "graphs", "static", "pair", "checkpoint", "out"),
    "clock a year ahead": clock(3e7, "graphs", "static", "pair", "checkpoint", "out"),
    "results older than inputs": clock(-3600, "out"),
    "results written again": rewritten("out/manifest.json"),
}


def true(work: Path) -> str | None:
    return untrue(work / "out")


def here(stage: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """The damage, to results made where they lie: export's manifest has the checkpoint's path, and the folder is a copy."""

    def do(work: Path) -> None:
        if stage == "export":
            manifest(lambda content: content["options"].update(checkpoint=str((work / "checkpoint").resolve())))(work)
        damage(work)

    return do


def of(stage: str) -> dict:
    return {"finished": True, "after": true, "fault": NO_TRACE if stage == "export" else None}


CASES = [
    *(Case(3, stage, name, PROMISE, here(stage, damage), expected=(0, 1), prints_not=UP_TO_DATE, more=FINISHED.get(stage, ()), **of(stage))
      for stage, listed in STALE.items() for name, damage in listed.items() if "without results" not in name),
    *(Case(3, stage, f"with {option}", PROMISE, here(stage, lambda work: None), expected=(0,), prints_not=UP_TO_DATE,
           more=(*FINISHED.get(stage, ()), option), **of(stage)) for stage, options in OPTIONS.items() for option in options
      ),
    *(Case(3, stage, name, PROMISE, here(stage, damage), expected=(0,), prints=UP_TO_DATE, more=FINISHED.get(stage, ()), **of(stage))
      for stage in RESULTS for name, damage in {**SAME, "inputs written again": rewritten(INPUTS[stage][0])}.items()),
]  # fmt: skip
