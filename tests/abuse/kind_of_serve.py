"""What `suture serve` reads before it answers anybody, and what --write-triton writes. The calls that it gets are in http.py."""

import os
from collections.abc import Callable
from pathlib import Path

from tests.abuse.case import Case
from tests.abuse.damages import IN_ITS_PLACE, at, instead
from tests.abuse.graphs import BROKEN
from tests.abuse.kind_01_outside import (
    PLACES,
    ROOTS,
    in_constant,
    in_function,
    in_initializer,
    of_another,
    placed,
    recorded,
)
from tests.abuse.kind_01_outside import PROMISE as READ
from tests.abuse.kind_02_loss import FOREIGN
from tests.abuse.kind_02_loss import PROMISE as KEPT
from tests.abuse.kind_05_numbers import NO_COUNTS
from tests.abuse.kind_05_numbers import PROMISE as NUMBERS
from tests.abuse.kind_10_values import GRAPHS, LIBRARY, REFERENCES
from tests.abuse.kind_10_values import PROMISE as VALUES
from tests.abuse.kind_11_hangs import PROMISE as HANGS
from tests.abuse.kind_13_graphs import PROMISE as VALID
from tests.abuse.kind_13_graphs import broken

STAGE = "serve"
OPTIONS = {
    "--port": ("", "nan", "-1", "65536", "1.5", "80a"), "--rows": NO_COUNTS,
    "--chunk": NO_COUNTS, "--lookup": ("-1", "65", "nan"), "--max-body": NO_COUNTS, "--max-prompt": NO_COUNTS,
}  # fmt: skip
TRITON = FOREIGN | {  # what is there already where --write-triton would put the model
    "another's model": lambda path: (path.mkdir(), (path / "config.pbtxt").write_text('name: "mine"')),
    "a link to a folder": lambda path: path.symlink_to("../../library"),
}


def triton(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        (work / "out" / "given").mkdir(parents=True)
        make(work / "out" / "given" / "model.onnx")

    return damage


def no_repository(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        (work / "out").mkdir()
        make(work / "out" / "given")

    return damage


CASES = [
    *(Case(1, STAGE, f"{name} {stand.__name__}", READ, placed(stand, location, make), says)
      for stand in (in_initializer, in_constant, in_function) for name, (location, make, says) in PLACES.items()),
    *(Case(1, STAGE, f"{name} as weights_root", READ, recorded(*root)) for name, root in ROOTS.items()),
    Case(1, STAGE, "another model's safetensors", READ, of_another(in_initializer)),
    *(Case(2, STAGE, f"{name} for --write-triton", KEPT, triton(make), more=("--write-triton", "{work}/out/given"))
      for name, make in TRITON.items()),
    *(Case(2, STAGE, f"{name} for its repository", KEPT, no_repository(make), more=("--write-triton", "{work}/out/given"))
      for name, make in IN_ITS_PLACE.items() if name != "folder"),
    *(Case(2, STAGE, f"--write-triton {folder}", KEPT, lambda work: None, more=("--write-triton", f"{{work}}/{folder}"))
      for folder in ("graphs", "library/../graphs", "secret", "secret/deeper", "n" * 300)),
    *(Case(5, STAGE, f"{option} {value[:24]!r}", NUMBERS, lambda work: None, option, arguments=("{work}/graphs/model.onnx",),
           more=(f"{option}={value}",)) for option, values in OPTIONS.items() for value in values),
    *(Case(10, STAGE, name, VALUES, at("graphs/model.onnx", damage), "model.onnx") for name, damage in GRAPHS.items()),
    *(Case(10, STAGE, f"reference {name}", VALUES, at("graphs/model.onnx", damage)) for name, damage in REFERENCES.items()),
    *(Case(10, STAGE, name, VALUES, at(file, damage), "library") for name, (file, damage) in LIBRARY.items()),
    *(Case(11, STAGE, f"{kind} for {file}", HANGS, at(file, instead(make)), os.path.dirname(file), seconds=90)
      for file in ("graphs/model.onnx", "graphs/model.data", "library/tokenizer.json", "library/tokenizer_config.json")
      for kind, make in IN_ITS_PLACE.items() if (file, kind) not in [("graphs/model.data", "a terabyte"),
                                                                     ("library/tokenizer_config.json", "link to nothing")]),
    *(Case(13, STAGE, name, VALID, broken(name), BROKEN[name][1]) for name in BROKEN),
]  # fmt: skip
