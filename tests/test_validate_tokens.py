"""The level of tokens: perplexity and continuations of equal graphs agree, and those of damaged ones do not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from decoder_graphs import CAPACITY, VOCAB, decoder, decoder_graph
from onnx import TensorProto

from suture.runtime.graphs import graph_of
from suture.validate.tokens import LIMITS, compare_tokens

ROOT = Path(__file__).parents[1]


class Letters:
    """A tokenizer of one byte a token."""

    size = VOCAB

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(32 + token for token in ids)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode()


TEXT = np.random.default_rng(3).integers(0, VOCAB, 400).tolist()


@pytest.mark.parametrize("last", [False, True])
def test_tokens_of_equal_graphs_agree(growing, last):
    found = compare_tokens(growing, decoder(static=True, last=last), Letters(), TEXT, TensorProto.FLOAT)
    assert found.passed
    reading = found.readings[0]
    assert (reading.windows, reading.window) == (4, CAPACITY)
    assert reading.mean_kl < 1e-9
    assert reading.agreement == 1
    assert reading.candidate_bits == pytest.approx(reading.reference_bits, rel=1e-6)
    assert (found.continuation.identical, found.continuation.new_tokens) == (4, 32)


def test_bits_per_byte_are_those_of_the_text(growing):
    """A model whose logits are all equal needs log2(vocabulary) bits a token, here a byte."""
    model = decoder_graph(static=True)
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "head")
    head.CopyFrom(onnx.numpy_helper.from_array(np.zeros((32, VOCAB), np.float32), "head"))
    flat = graph_of(model, ROOT, "flat")
    found = compare_tokens(growing, flat, Letters(), TEXT, TensorProto.FLOAT)
    assert found.readings[0].candidate_bits == pytest.approx(np.log2(VOCAB), rel=1e-5)
    assert found.readings[0].reference_bits != pytest.approx(np.log2(VOCAB), rel=1e-2)
    assert not found.passed


@pytest.mark.parametrize("fault", [{"disturb": 1}, {"scale": 1.5}, {"nan": np.nan}])
@pytest.mark.parametrize("dtype", LIMITS)
def test_tokens_of_a_damaged_graph_differ(growing, fault, dtype):
    assert not compare_tokens(growing, decoder(static=True, **fault), Letters(), TEXT, dtype).passed
