"""What a pipeline has made, as an object of a program: it can be stepped, and continues text."""

from dataclasses import dataclass
from pathlib import Path

from suture.core.errors import UserError
from suture.core.signature import Signature
from suture.generate.batch import Batch, Sequence
from suture.generate.opening import Opened, find_files, open_model
from suture.generate.prompts import said
from suture.generate.text import TextStream
from suture.models.library_tokenizer import LibraryTokenizer
from suture.models.tokenizer import Tokenizer, open_tokenizer
from suture.runtime.decoders import RowDecoder
from suture.serve.request import Sampling
from suture.serve.speed import Speed


@dataclass(frozen=True)
class Model:
    """`tokenizer` has encode(text) -> ids and decode(ids) -> bytes or text, as the checkpoint's own."""

    opened: Opened
    tokenizer: Tokenizer | LibraryTokenizer

    @property
    def signature(self) -> Signature:
        """What the graph's inputs and outputs are for, and the cache's capacity."""
        return self.opened.model.signature

    def decoder(self, batch: int) -> RowDecoder:
        """Rows with empty caches: step(tokens int64 [batch, S], counts int64 [batch], alpha float32 [batch]) returns logits
        [batch, S, vocab], or [batch, 1, vocab] where the graph gives the last token's only. `counts`: valid tokens of each row,
        which is padded on the right; `alpha`: 1, but for dynamic NTK."""
        return self.opened.model.decoder(batch, noise=False)

    def generate(self, prompt: str, max_tokens: int = 256, chat: bool = False, sampling: Sampling | None = None) -> str:
        """The text that follows the prompt, or, with `chat`, the answer to it. `sampling`: the likeliest token by default.
        Raises UserError for a prompt that is empty or longer than the model takes, and for a speech model."""
        model = self.opened.model
        if model.signature.encoder_caches or model.signature.layout:
            raise UserError("generate", "the model takes inputs beside text", "step it with decoder()")
        ids = said(prompt, "prompt", chat, None).ids(self.tokenizer, model.longest and model.longest - len(model.prefix))
        stops = frozenset(self.tokenizer.stop_ids(chat))
        vocab = min(self.tokenizer.size, model.vocab)
        batch = Batch(model, 1, sampling or Sampling(), vocab, self.opened.chunk, Speed())
        sequence = Sequence(0, ids, max_tokens, stops, TextStream(self.tokenizer.decode, []))
        (done,) = batch.run(iter([sequence]), lambda sequence, piece: None)
        return done.text.text


def open_pipeline(out: Path, runtime: str = "auto", checkpoint: Path | None = None) -> Model:
    """Raises UserError where there is nothing in the folder that can run here."""
    files = find_files(out, checkpoint)
    return Model(open_model(files, runtime), open_tokenizer(files.checkpoint))
