"""Memory bound to a session on a GPU, where it reads some inputs on the CPU: each step computes with its own values."""

from dataclasses import replace

import numpy as np
import pytest
from fake_cuda import CudaSession, fake_cuda

from suture.runtime import graphs
from suture.runtime.decoders import StaticDecoder
from suture.runtime.graphs import OnnxDecoder, captured_session, open_graph

ROWS = 3
INPUTS = {"input_ids", "position_ids", "write_indices", "ntk_alpha"}
CACHES = {"past_key_values.0.key", "past_key_values.2.value"}


@pytest.fixture(scope="module")
def portable(tiny_portable) -> OnnxDecoder:
    return open_graph(tiny_portable / "model.onnx")


class Conversation:
    """Rows of a decoder, and what each has read so far."""

    def __init__(self, portable: OnnxDecoder, decoder: StaticDecoder):
        self.portable, self.decoder = portable, decoder
        self.read = [np.zeros(0, np.int64) for _ in range(ROWS)]
        self.random = np.random.default_rng(0)

    def step(self, width: int, rows: slice) -> None:
        """The rows read `width` tokens more each, and give the logits of all they have read."""
        places = range(*rows.indices(ROWS))
        tokens = self.random.integers(5, self.portable.vocab, (len(places), width))
        counts = np.full(len(places), width)
        logits = self.decoder.advance(tokens, counts, np.ones(len(places), np.float32), rows).numpy()
        for row, added, found in zip(places, tokens, logits):
            self.read[row] = np.concatenate([self.read[row], added])
            expected = plain(self.portable, self.read[row])[-width:]
            assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max(), (row, len(self.read[row]))

    def keep(self, row: int, count: int) -> None:
        self.decoder.keep(row, count)
        self.read[row] = self.read[row][:count]


def plain(graph: OnnxDecoder, tokens: np.ndarray) -> np.ndarray:
    """Logits [S,vocab] of one step over all tokens [S], nothing bound and nothing kept."""
    feeds = {"input_ids": tokens[None], "position_ids": np.arange(len(tokens))[None]}
    feeds |= {"write_indices": np.zeros(1, np.int64), "ntk_alpha": np.ones(1, np.float32)}
    empty = np.zeros((1, *graph.cache_shapes[0]), np.float32)
    feeds |= {cache.past: empty for cache in graph.signature.caches}
    return graph.session.run(["logits"], feeds)[0][0]


@pytest.mark.parametrize("on_cpu", [set(), {"write_indices"}, INPUTS, INPUTS | CACHES], ids=len)
@pytest.mark.parametrize("captured", [False, True])
def test_each_step_computes_with_its_own_values(portable, on_cpu, captured):
    """Prompts of equal and other widths, chunks, rows begun anew, steps of a token for all rows and for some."""
    session = CudaSession(portable.session, on_cpu)
    decoding = CudaSession(portable.session, captured=True)
    on_gpu = replace(portable, session=session, device="cuda", decoding=lambda batch: decoding if captured else None)
    with fake_cuda():
        rows = Conversation(portable, on_gpu.decoder(ROWS))
        for row, width in ((0, 7), (1, 7), (2, 5)):
            rows.step(width, slice(row, row + 1))
        for _ in range(3):
            rows.step(1, slice(None))
        rows.keep(1, 0)
        rows.step(9, slice(1, 2))
        rows.keep(2, 2)
        for _ in range(2):  # chunks
            rows.step(6, slice(2, 3))
        for _ in range(2):
            rows.step(1, slice(None))
            rows.step(1, slice(1, 3))
        rows.step(4, slice(None))
        rows.step(4, slice(None))
    assert decoding.runs == (5 if captured else 0)


def test_steps_are_not_captured_where_the_cpu_computes_a_part(portable, tmp_path, monkeypatch):
    """That part would not be replayed."""
    monkeypatch.setattr(graphs.torch.cuda, "mem_get_info", lambda: (1, 1))
    monkeypatch.setattr(graphs, "weight_bytes", lambda model: 0)
    for on_cpu in (set(), {"write_indices"}):
        session = CudaSession(portable.session, on_cpu)
        monkeypatch.setattr(graphs, "cuda_session", lambda *_, captured, session=session: session)
        assert captured_session(None, tmp_path, "x", 1) is (None if on_cpu else session)
