"""CPM-Ant, whose prompt sees itself in both directions and begins with the tokens of a task: its numbers are
transformers', a cache of any capacity computes the same, and text comes out of it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_export_repeat import differences, plain_ir

import surgery.__main__ as surgery
from contracts.errors import UserError
from contracts.signature import find_signature
from export.trace import TRACED_LAYERS, trace
from generate.batch import Batch, Sequence
from generate.command import Generator
from generate.options import parse
from generate.prompts import Prompt
from generate.sampling import Sampler, Sampling
from generate.speed import Speed
from generate.text import TextStream
from models import architecture, load_model, open_checkpoint
from models.cpm import bucket_table
from runtime.graphs import open_graph
from surgery.capacity import main as change_capacity
from tests.families import CAPACITY, FAMILIES, checkpoint, operated, reference, shared_folder
from tests.test_models import levels
from validate.compare import PASSED, compare
from validate.scenarios import make_scenarios, random_tokens

ROOT = Path(__file__).parents[1]
PREFIX = 4


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return shared_folder(tmp_path_factory)


def padded(rows: list[torch.Tensor], left: bool) -> torch.Tensor:
    """Rows of any lengths as one int64 tensor, 0 elsewhere."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left" if left else "right")


def test_ants_numbers_are_transformers(shared):
    """Prompts of three lengths, then decoding from the cache: theirs padded on the left, with their own prefix."""
    ours, model = load_model(open_checkpoint(checkpoint("cpmant", shared)), torch.float32), reference("cpmant")
    dims = ours.dimensions
    torch.manual_seed(1)
    texts = [torch.randint(3, dims.vocab, (length,)) for length in (40, 33, 21)]
    prompts = [text[:-5] for text in texts]
    rows = [torch.cat([torch.tensor(dims.prefix), prompt]) for prompt in prompts]
    mask = padded([torch.ones_like(row) for row in rows], left=False)
    past = [torch.zeros(3, dims.kv_heads, 0, dims.head_dim)] * (2 * dims.layers)
    found, past = ours(padded(rows, left=False), (mask.cumsum(1) - 1).clamp(min=0), mask, past)
    out = model(padded(prompts, left=True), use_cache=True)
    assert out.logits.std() > 0.1
    for row, prompt in enumerate(prompts):
        expected = out.logits[row, -len(prompt) :]
        torch.testing.assert_close(found[row, PREFIX : PREFIX + len(prompt)], expected, atol=2e-5, rtol=1e-4)
    for step in range(5, 0, -1):
        tokens = torch.stack([text[-step] for text in texts])[:, None]
        positions, mask = mask.sum(1, keepdim=True), torch.cat([mask, torch.ones_like(tokens)], dim=1)
        found, past = ours(tokens, positions, mask, past)
        whole = padded([text[: len(text) - step + 1] for text in texts], left=True)
        out = model(whole, past_key_values=out.past_key_values, use_cache=True)
        torch.testing.assert_close(found, out.logits[:, -1:], atol=2e-5, rtol=1e-4)


def test_buckets_of_the_published_models_are_the_source_formula():
    """As transformers computes them, far beyond the farthest distance."""
    theirs = reference("cpmant").cpmant.position_bias
    for buckets, farthest in ((512, 2048), (256, 2048), (16, 24)):
        distances = torch.arange(-2 * farthest, 2 * farthest + 1)
        expected = theirs._position_bucket(distances, num_buckets=buckets, max_distance=farthest)
        table = bucket_table(buckets, farthest)
        assert torch.equal(table[distances.clamp(-farthest, farthest) + farthest], expected.long())


@pytest.mark.parametrize("name", ["cpmant"])
def test_half_precision_agrees_and_builds(name, shared, tmp_path):
    out = operated(name, "float16", shared)
    assert [level["status"] for level in levels(out)[:3]] == [PASSED] * 3
    for dtype in ("float16", "bfloat16"):
        lowered = operated(name, dtype, shared) / "surgery" / "model.trt.onnx"
        command = [sys.executable, "-m", "build", str(lowered), "--out", str(tmp_path / dtype), "--compute-capability", "8.9"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        description = json.loads((tmp_path / dtype / "engine.json").read_text())
        assert description["signature"]["bidirectional"]
        assert {tensor["role"] for tensor in description["inputs"]} >= {"sequence_lengths", "positions"}


@pytest.mark.parametrize("name", ["cpmant"])
def test_a_deep_one_is_the_whole_trace(name, tmp_path):
    config = {"model_type": name, **FAMILIES[name].config, "num_hidden_layers": 7}
    repeated = trace(architecture(config, tmp_path), torch.float32)
    whole = trace(architecture(config, tmp_path), torch.float32, whole=True)
    assert [graph.metadata_props[TRACED_LAYERS] for graph in (repeated, whole)] == ["4", "7"]
    assert differences(plain_ir(whole), plain_ir(repeated)) == []


@pytest.mark.parametrize("name", ["cpmant"])
def test_another_capacity_and_the_last_logits_compute_the_same(name, shared, tmp_path):
    out = operated(name, "float32", shared)
    change_capacity([str(out / "surgery"), "--capacity", "50", "--out", str(tmp_path / "50")])
    exported = out / "export" / "model.onnx"
    surgery.main([str(exported), "--out", str(tmp_path / "last"), "--capacity", "50", "--logits", "last"])
    made = open_graph(out / "surgery" / "model.onnx")
    assert not made.last_only
    scenarios = make_scenarios(random_tokens(made.vocab, 0), 50, None, prefix=made.prefix)
    for folder in ("50", "last"):
        changed = open_graph(tmp_path / folder / "model.onnx")
        assert (changed.capacity, changed.last_only) == (50, folder == "last")
        assert list(changed.signature.prefix) == list(made.prefix)
        assert compare(made, changed, scenarios).status == PASSED


def test_what_a_step_is_padded_with_is_not_seen(shared):
    """Beside a longer row, and over a cache full of noise, a row gets the logits that it gets alone."""
    graph = open_graph(operated("cpmant", "float32", shared) / "surgery" / "model.onnx")
    tokens = np.random.default_rng(0).integers(3, graph.vocab, (2, 20))
    together = graph.decoder(2).step(tokens, np.array([20, 9]), np.ones(2, np.float32))
    alone = graph.decoder(1).step(tokens[1:, :9], np.array([9]), np.ones(1, np.float32))
    np.testing.assert_allclose(together[1, :9], alone[0], atol=2e-5)
    longer = graph.decoder(1).step(tokens[1:, :10], np.array([10]), np.ones(1, np.float32))
    assert np.abs(longer[0, :9] - alone[0]).max() > 1e-3  # a token of its own is


def test_a_graph_that_does_not_say_so_stays_as_it_is(shared, tmp_path):
    """A mask of padding alone over a bias is understood only where the graph says that a prompt comes in one step."""
    model = onnx.load(operated("cpmant", "float32", shared) / "export" / "model.onnx")
    kept = [entry for entry in model.metadata_props if entry.key != "suture.bidirectional"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "model.onnx")
    surgery.main([str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out")])
    assert "the mask adds numbers that are no slope times a distance" in (tmp_path / "out" / "report.json").read_text()
    assert not find_signature(onnx.load(tmp_path / "out" / "model.onnx")).static


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
        return Batch(model, 1, Sampler(Sampling(), model.vocab), chunk, Speed())

    prompts = [list(range(10, 30)), list(range(10, 36))]
    apart = [answers(batch(1000), [prompt])[0] for prompt in prompts]
    assert answers(batch(7), prompts) == apart


def test_a_prompt_longer_than_a_step_is_refused(speaking):
    options = parse([str(speaking / "surgery" / "model.onnx"), "--prompt", "x", "--runtime", "cpu"])
    generator = Generator(options)
    with pytest.raises(UserError, match=f"and the model takes {CAPACITY - PREFIX}"):
        generator._sequence(0, Prompt("--prompt", "天" * 70))
    generator.opened = replace(generator.opened, chunk=16)  # an engine's widest step
    with pytest.raises(UserError, match="4 come before it, and a step has room for 16; shorten it"):
        generator._sequence(0, Prompt("--prompt", "天" * 20))


def test_unusable_configs_get_one_line(tmp_path):
    config = {"model_type": "cpmant", **FAMILIES["cpmant"].config}
    for change, said in (({"dim_ff": None}, "has no 'dim_ff'"), ({"mask_modules": [[True, False]]}, "pruned")):
        with pytest.raises(UserError, match=said):
            architecture(config | change, tmp_path / "config.json")
