"""Text out of CPM: what transformers generates, from prompts that are read whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from suture.core.errors import UserError
from suture.generate.batch import Batch, Sequence
from suture.generate.command import Generator
from suture.generate.options import parse
from suture.generate.prompts import Prompt
from suture.generate.text import TextStream
from suture.runtime.graphs import open_graph
from suture.serve.request import Sampling
from suture.serve.speed import Speed
from tests.families import CAPACITY, FAMILIES, checkpoint, operated, reference

PREFIX = FAMILIES["cpmant"].config["prompt_length"]


@pytest.fixture(scope="session")
def speaking(shared) -> Path:
    """A pipeline's folder whose checkpoint has CPM-Ant's tokenizer."""
    out = operated("cpmant", "float32", shared)
    folder = checkpoint("cpmant", shared)
    tokens = [
        "<unk>",
        "<pad>",
        "<s>",
        "</s>",
        "<d>",
        "</d>",
        "</_>",
        "</n>",
        *"今天气不错，",
        *map(chr, range(0x4E10, 0x4E10 + 146)),
    ]
    assert len(tokens) == FAMILIES["cpmant"].config["vocab_size"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CpmAntTokenizer"}))
    return out


def test_text_is_transformers(speaking, capsys):
    """From a prompt in words, greedily: the static and the growing graph's text is what transformers generates."""
    text, model = "今天天气不错，", reference("cpmant")
    for graph in ("surgery", "export"):
        options = parse([str(speaking / graph / "model.onnx"), "--prompt", text, "--max-tokens", "12", "--runtime", "cpu"])
        generator = Generator(options)
        generator.stop_ids = frozenset()
        ids = generator.tokenizer.encode(text)
        assert len(ids) > 5
        expected = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(ids) :]
        generator.one(Prompt("--prompt", text))
        assert capsys.readouterr().out == generator.tokenizer.decode(expected.tolist()) + "\n"


def test_a_prompt_is_read_whole_whatever_the_cache_holds(speaking):
    """A second prompt that begins like the first is read anew; a chunk's size does not cut it."""
    model = open_graph(speaking / "surgery" / "model.onnx")

    def answers(batch: Batch, prompts: list[list[int]]) -> list[list[int]]:
        asked = [Sequence(i, prompt, 6, frozenset(), TextStream(str)) for i, prompt in enumerate(prompts)]
        return [sequence.answer for sequence in batch.run(iter(asked), lambda sequence, piece: None)]

    def batch(chunk: int) -> Batch:
        return Batch(model, 1, Sampling(), model.vocab, chunk, Speed())

    prompts = [list(range(10, 30)), list(range(10, 36))]
    apart = [answers(batch(1000), [prompt])[0] for prompt in prompts]
    assert answers(batch(7), prompts) == apart


def test_what_needs_more_than_text_says_so(shared):
    options = parse([str(operated("cpmbee", "float32", shared)), "--prompt", "x", "--runtime", "cpu"])
    with pytest.raises(UserError, match="takes inputs beside text"):
        Generator(options)


def test_a_prompt_longer_than_a_step_is_refused(speaking):
    options = parse([str(speaking / "surgery" / "model.onnx"), "--prompt", "x", "--runtime", "cpu"])
    generator = Generator(options)
    with pytest.raises(UserError, match=f"and the model takes {CAPACITY - PREFIX}"):
        generator._sequence(0, Prompt("--prompt", "天" * 70))
    generator.opened = replace(generator.opened, chunk=16)  # an engine's widest step
    with pytest.raises(UserError, match="4 come before it, and a step has room for 16; shorten it"):
        generator._sequence(0, Prompt("--prompt", "天" * 20))
