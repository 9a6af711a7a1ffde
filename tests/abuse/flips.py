"""Good files whose bytes are changed at random, by the stage that reads them; and the ways to change them."""

import random

from tests.abuse.case import CUTTERS, folder_of

GRAPH_READERS = ("surgery", "build", "validate", "generate", "check", "compare", *CUTTERS)
FLIPPED = {
    "export": ("checkpoint/config.json", "checkpoint/model.safetensors", "out/manifest.json"),
    **{stage: (f"{folder_of(stage)}/model.onnx",) for stage in GRAPH_READERS},
    "golden": ("golden/golden.json", "golden/decoder.polygraphy.json", "pipeline/surgery/manifest.json", "pipeline/export/model.onnx"),
    "bundle": ("bundled/results.npz", "bundled/surgery/manifest.json", "bundled/build/engine.json"),
    "convert": ("checkpoint/model.bin",),
}  # fmt: skip
FLIPPED["generate"] += ("library/tokenizer.json", "library/tokenizer_config.json", "library/generation_config.json")
for writer in ("surgery", "build", "validate", *CUTTERS):
    FLIPPED[writer] += ("out/manifest.json",)  # of an earlier run
REACHED = 20_000  # bytes from a file's beginning: where what it says of itself stands
TOKENS = (
    b"-1",
    b"0",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"1e999",
    b"NaN",
    b"true",
    b"../",
    b"\0",
    b"\xff" * 8,
    b"9" * 30,
    b"\\ud800",
)


def changed(content: bytes, draw: random.Random) -> bytes:
    """One to four changes: a byte flipped, a piece left out, repeated, moved, or replaced by what parsers stumble over."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(min(len(found), REACHED) or 1)
        piece = found[place : place + draw.choice((1, 2, 8, 64))]
        match draw.randrange(6):
            case 0 | 1:
                found[place : place + 1] = bytes([draw.randrange(256)])
            case 2:
                del found[place : place + len(piece)]
            case 3:
                found[place:place] = piece * draw.choice((1, 2, 100))
            case 4:
                found[place : place + len(piece)] = draw.choice(TOKENS)
            case 5:
                del found[draw.randrange(len(found) or 1) :]
    return bytes(found)
