"""Requests of a scheduler, what they are told, and what each gets alone."""

from dataclasses import dataclass, field

from decoder_graphs import VOCAB, decoder

from suture.runtime.graphs import OnnxDecoder
from suture.serve.engine import Scheduler
from suture.serve.request import GenerationRequest, Sampling, Token

GREEDY = Sampling()
MODELS = {"static": decoder(static=True), "growing": decoder(static=False)}


@dataclass
class Asked:
    """A request, and what its callbacks were told."""

    prompt: tuple[int, ...]
    limit: int
    sampling: Sampling = GREEDY
    stop: int | None = None
    told: list[Token] = field(default_factory=list)
    why: list[str] = field(default_factory=list)

    def request(self, **options) -> GenerationRequest:
        def take(token: Token) -> bool:
            self.told.append(token)
            return token.id == self.stop

        return GenerationRequest(self.prompt, self.limit, take, self.why.append, self.sampling, **options)

    @property
    def answer(self) -> list[int]:
        return [token.id for token in self.told]


class Recorded(Scheduler):
    """Tells of each tick the widths of its steps."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.steps: list[tuple[str, int]] = []
        for name in ("advance", "decode"):
            setattr(self.decoder, name, self._recording(name, getattr(self.decoder, name)))

    def _recording(self, name, step):
        def recorded(tokens, counts, alpha, rows=slice(None)):
            width = tokens.shape[1] if tokens.ndim == 2 else 1
            self.steps.append((name, width))
            assert rows.stop <= len(self.decoder.lengths)
            return step(tokens, counts, alpha, rows)

        return recorded


def scheduler(model: OnnxDecoder, rows: int, chunk: int = 8, **options) -> Recorded:
    return Recorded(model, rows, chunk, VOCAB, **options)


def finish(made: Scheduler, most: int = 10_000) -> int:
    """Ticks until nothing is left."""
    for ticks in range(most):
        if not made.busy:
            return ticks
        made.tick()
    raise AssertionError("it does not end")


ALONE: dict[tuple, tuple[list[int], str]] = {}


def alone(model: OnnxDecoder, asked: Asked) -> tuple[list[int], str]:
    """What the request gets with nobody beside it, read in one step."""
    key = model.signature.static, asked.prompt, asked.limit, asked.sampling, asked.stop
    if key not in ALONE:
        made, one = scheduler(model, 1, chunk=1000), Asked(asked.prompt, asked.limit, asked.sampling, asked.stop)
        made.submit(one.request())
        finish(made)
        ALONE[key] = one.answer, one.why[0]
    return ALONE[key]
