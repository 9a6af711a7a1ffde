"""How many of tiny-vlm's answers about drawn pictures are right: in PyTorch, the portable graphs, TensorRT's network; and with faults planted.

    python -m benchmarks.answers OUT [--count 200] [--only portable network faults]

OUT: a folder that `suture run --model tiny-vlm --out OUT` has made; `--capacity 256` makes it several times faster. The pictures are of
seeds that it was not trained on. A fault (benchmarks/answer_faults.py) is one change of one part's portable graph. Counted are questions of
all kinds, and descriptions of pictures of four shapes: yes or no is right by chance every second time, and a number nearly as often,
but a description is right only where each of its nine words for colours, shapes and the background is.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.answer_faults import FAULTS, Fault
from suture.core import arguments
from suture.core.command import CommandParser, run
from suture.core.manifest import recorded_option
from suture.core.parts import find_parts
from suture.core.pictures import PIXELS, VISION
from suture.core.sessions import FUSED, new_session
from suture.core.weights import load_graph, weights_root
from suture.models.architectures import open_checkpoint
from suture.models.drawn_pictures import random_scene
from suture.models.drawn_questions import MOST, caption
from suture.models.tokenizer import open_tokenizer
from suture.runtime.graphs import graph_of, open_embedding
from suture.runtime.looking import Looker, size_of
from suture.runtime.network_decoder import open_network
from suture.runtime.networks import Network, in_network, in_onnxruntime
from suture.runtime.placeholders import Placeholders
from suture.runtime.seen import Seen
from suture.validate import answers
from suture.validate.level import AnswerResult
from suture.validate.reference import TorchReference, load_reference
from suture.validate.runners import SteppedModel

ROWS = ("pytorch", "portable", "network", "faults")
SEED = 1 << 21


class Judge:
    """The questions, and the files of the parts that a pipeline has made. `described`: all ask for what a picture of four shapes shows."""

    def __init__(self, out: Path, count: int, described: bool = False):
        self.parts = {part.name: part for part in find_parts(out)}
        self.checkpoint = Path(recorded_option(self.parts["decoder"].folder / "export", "checkpoint"))
        self.size = size_of(self.parts[VISION].inputs[PIXELS]["shape"])
        self.tokenizer, self.placeholders = open_tokenizer(self.checkpoint), Placeholders(self.checkpoint)
        self.asked = descriptions(self.size, count) if described else answers.drawn(self.size, SEED, count)
        self.embed = open_embedding(self.graph("embed", "export"))

    def graph(self, part: str, stage: str = "surgery", name: str = "model.onnx") -> Path:
        return self.parts[part].folder / stage / name

    def right(self, vision: Network, decoder: SteppedModel, embed: Callable | None = None) -> int:
        """How many of their answers are."""
        found = answers.answered(self._seeing(vision, decoder, embed), self.tokenizer, self.asked)
        return sum(text == each.right for text, each in zip(found, self.asked))

    def compared(self, reference: tuple[Network, SteppedModel], candidate: tuple[Network, SteppedModel]) -> AnswerResult:
        """As level 5 compares them."""
        return answers.compare_answers(self._seeing(*reference), self._seeing(*candidate), self.tokenizer, self.asked)

    def _seeing(self, vision: Network, decoder: SteppedModel, embed: Callable | None = None) -> SteppedModel:
        looker, seen = Looker(self.checkpoint, vision, self.size), Seen(embed or self.embed)
        for each in self.asked:
            ids = seen.add(*looker.features(Image.fromarray(each.picture)))
            each.prompt = answers.prompt(each.question, self.tokenizer, self.placeholders, ids)
        return replace(decoder, embed=seen)


def main() -> None:
    parser = CommandParser(prog="answers", description="Count the answers about drawn pictures that are right.")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--count", type=arguments.whole(1, 1000), default=200, help="of questions (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    options = parser.parse_args()
    judges = [Judge(options.out, options.count, described) for described in (False, True)]
    judge = judges[0]
    vision, decoder = in_onnxruntime(judge.graph(VISION), fast=True), opened(judge.graph("decoder"))

    def row(name: str, *models) -> None:
        started = time.monotonic()
        every, described = (each.right(*models) for each in judges)
        print(f"| {name} | {every} | {described} of {options.count} | {time.monotonic() - started:.0f} s |", flush=True)

    if "pytorch" in options.only:
        module = load_reference(open_checkpoint(judge.checkpoint), decoder.dtype)
        reference = TorchReference("PyTorch", decoder.dtype, module)
        row("PyTorch, float32", answers.in_torch(module), reference, answers.embedding(module))
    if "portable" in options.only:
        row("portable graphs", vision, decoder)
    if "network" in options.only:
        lowered = [judge.graph(part, name="model.trt.onnx") for part in (VISION, "decoder")]
        row("TensorRT's network", in_network(lowered[0]), open_network(lowered[1]))
    if "faults" in options.only:
        for name, (part, fault) in FAULTS.items():
            if part == VISION:
                row(f"{part}: {name}", damaged(judge.graph(part), fault), decoder)
            else:
                row(f"{part}: {name}", vision, opened(judge.graph(part), fault))


def descriptions(size: tuple[int, int], count: int) -> list[answers.Asked]:
    random = np.random.default_rng([SEED, MOST])
    scenes = [random_scene(random, *size, MOST) for _ in range(count)]
    return [answers.Asked(scene.picture(*size), *caption(scene, random)) for scene in scenes]


def opened(path: Path, fault: Fault = lambda graph: None) -> SteppedModel:
    model = load_graph(path)
    fault(model.graph)
    return graph_of(model, weights_root(path), str(path), as_written=False)


def damaged(path: Path, fault: Fault) -> Network:
    model = load_graph(path)
    fault(model.graph)
    session = new_session(model, weights_root(path), level=FUSED)
    (given,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    kind = np.float16 if given.type == "tensor(float16)" else np.float32
    return lambda inputs: dict(zip(names, session.run(names, {given.name: inputs[given.name].astype(kind)})))


if __name__ == "__main__":
    run("answers", main)
