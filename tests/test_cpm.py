"""CPM, whose prompt sees itself in both directions: CPM-Ant's numbers are transformers', CPM-Bee's the original's formulas,
a cache of any capacity computes the same, and text comes out."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import build_graphs
import numpy as np
import onnx
import pytest
import torch
from fake_engine import FakeEngine
from onnx.external_data_helper import load_external_data_for_model
from test_export_repeat import differences, plain_ir
from transformers import CpmAntConfig
from transformers.models.cpmant.modeling_cpmant import CpmAntSegmentPositionEmbedding

import surgery.__main__ as surgery
from contracts.errors import UserError
from contracts.layout import LAYOUT, MOST_SEGMENTS, made_up
from contracts.signature import find_signature
from contracts.weights import load_graph, weights_root
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
from runtime.engine import Engine
from runtime.engine_decoder import EngineModel, signature_of
from runtime.graphs import open_graph
from surgery.capacity import main as change_capacity
from tests.families import CAPACITY, FAMILIES, checkpoint, operated, reference, shared_folder
from tests.test_models import levels
from validate.bundle import _expected
from validate.compare import PASSED, compare
from validate.scenarios import make_scenarios, random_tokens

ROOT = Path(__file__).parents[1]
PREFIX = 4
SOURCE = CpmAntSegmentPositionEmbedding(CpmAntConfig(num_attention_heads=1))  # its formula of buckets, CPM-Bee's too


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


def original_bee(
    tensors: dict[str, torch.Tensor], ids: torch.Tensor, subs: torch.Tensor, position: torch.Tensor, segment: torch.Tensor,
    segment_rel: torch.Tensor, num_segments: int, state: dict | None,
) -> tuple[torch.Tensor, dict]:  # fmt: skip
    """CPMBee.inference of OpenBMB/CPM-Bee for one sample in which all is context, as its generation calls it. ids, subs,
    position, segment: int64 [S]; segment_rel: [num_segments²]. Returns logits [S,vocab] and what the next step is given."""
    config = FAMILIES["cpmbee"].config
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    buckets, farthest = config["position_bias_num_buckets"], config["position_bias_max_distance"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ tensors[f"cpmbee.encoder.{name}.weight"].T / math.sqrt(x.shape[-1])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * tensors[f"cpmbee.encoder.{name}.weight"]

    before = state or {"position": position[:0], "segment": segment[:0], "caches": [None] * layers}
    positions, segments = torch.cat([before["position"], position]), torch.cat([before["segment"], segment])
    bucket = segment_rel[segment[:, None] * num_segments + segments[None, :]]
    inner = SOURCE._position_bucket(positions[None, :] - position[:, None], num_buckets=buckets, max_distance=farthest)
    bias = tensors["cpmbee.position_bias.relative_attention_bias"]
    bias = bias[torch.where(bucket == 0, inner.long(), bucket - 1 + buckets)].permute(2, 0, 1)

    inv_freq = 1.0 / (10000 ** (torch.arange(0, hidden, 2, dtype=torch.float32) / hidden))
    freqs = (subs * config["distance_scale"])[..., None].float() * inv_freq[None, :]
    emb = torch.cat((freqs, freqs), dim=-1)
    x = tensors["cpmbee.input_embedding.weight"][ids] / math.sqrt(hidden)
    x = x * emb.cos() + torch.cat([-x[..., hidden // 2 :], x[..., : hidden // 2]], dim=-1) * emb.sin()
    caches = []
    for layer, cache in enumerate(before["caches"]):
        at, ff = f"layers.{layer}.self_att", f"layers.{layer}.ffn"
        inside = norm(x, f"{at}.layernorm_before_attention")
        q, k, v = (
            linear(inside, f"{at}.self_attention.project_{each}").unflatten(-1, (heads, -1)).transpose(0, 1) for each in "qkv"
        )
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        caches.append((k, v))
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias, dim=-1)
        attended = linear((weights @ v).transpose(0, 1).flatten(1), f"{at}.self_attention.attention_out")
        x = (x + attended) / 1.05
        inside = norm(x, f"{ff}.layernorm_before_ffn")
        gate = torch.nn.functional.gelu(linear(inside, f"{ff}.ffn.w_in.w_0"))
        x = (x + linear(gate * linear(inside, f"{ff}.ffn.w_in.w_1"), f"{ff}.ffn.w_out")) / 1.05
    logits = norm(x, "output_layernorm") / math.sqrt(hidden) @ tensors["cpmbee.input_embedding.weight"].T
    return logits, {"position": positions, "segment": segments, "caches": caches}


def test_bees_numbers_are_the_originals(shared):
    """Three samples of their own lengths, segments, relations and subscripts in one batch, then an answer, whose places the
    original numbers from 0 again."""
    opened = open_checkpoint(checkpoint("cpmbee", shared))
    ours, answer = load_model(opened, torch.float32), 4
    dims, tensors = ours.dimensions, {name: opened.load(name) for name in opened.tensors}
    torch.manual_seed(2)
    lengths, counts = (17, 11, 5), (7, 5, 3)  # of prompts, and their numbers of segments, the answer's among them
    ids = [torch.randint(3, dims.vocab, (length + answer,)) for length in lengths]
    subs = [torch.randint(0, 3, (length + answer,)) for length in lengths]
    segments = [torch.cat([torch.randint(0, n - 1, (length,)).sort()[0], torch.full((answer,), n - 1)])
                for length, n in zip(lengths, counts)]  # fmt: skip
    relations = [torch.randint(1, 10, (n, n)).fill_diagonal_(0) for n in counts]
    made = torch.zeros(3, MOST_SEGMENTS, MOST_SEGMENTS, dtype=torch.int64)
    for row, each in zip(made, relations):
        row[: len(each), : len(each)] = each
    layout = (padded(segments, left=False), made, padded(subs, left=False))
    mask = padded([torch.ones(length, dtype=torch.int64) for length in lengths], left=False)
    past = [torch.zeros(3, dims.kv_heads, 0, dims.head_dim)] * (2 * dims.layers)
    tokens = padded([row[:length] for row, length in zip(ids, lengths)], left=False)
    found, past = ours(tokens, (mask.cumsum(1) - 1).clamp(min=0), mask, past, *layout)
    states = []
    for row, length in enumerate(lengths):
        prompt = (each[row][:length] for each in (ids, subs))
        at = torch.arange(length), segments[row][:length]
        expected, state = original_bee(tensors, *prompt, *at, relations[row].flatten(), counts[row], None)
        assert expected.std() > 0.1
        torch.testing.assert_close(found[row, :length], expected, atol=2e-5, rtol=1e-4)
        states.append(state)
    for step in range(answer):
        places = torch.tensor(lengths)[:, None] + step
        mask = torch.cat([mask, torch.ones_like(places)], dim=1)
        tokens = torch.stack([row[length + step] for row, length in zip(ids, lengths)])[:, None]
        found, past = ours(tokens, places, mask, past, *layout)
        for row, length in enumerate(lengths):
            now = (each[row][length + step][None] for each in (ids, subs))
            at = torch.tensor([step]), segments[row][length + step][None]
            expected, states[row] = original_bee(tensors, *now, *at, relations[row].flatten(), counts[row], states[row])
            torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=1e-4)


def test_rows_have_segments_of_their_own(shared):
    """The portable graph in onnxruntime, two rows with other segments, relations and subscripts, against the module."""
    module = load_model(open_checkpoint(checkpoint("cpmbee", shared)), torch.float32)
    graph = open_graph(operated("cpmbee", "float32", shared) / "surgery" / "model.onnx")
    random = np.random.default_rng(3)
    layout = {"segment_ids": random.integers(0, 5, (2, CAPACITY)), "input_id_subs": random.integers(0, 3, (2, CAPACITY)),
              "segment_relations": random.integers(0, 9, (2, MOST_SEGMENTS, MOST_SEGMENTS))}  # fmt: skip
    tokens, counts = random.integers(3, graph.vocab, (2, 20)), np.array([20, 13])
    decoder = graph.decoder(2)
    decoder.cross(layout)
    found = decoder.step(tokens, counts, np.ones(2, np.float32))
    mask = torch.arange(20)[None, :] < torch.from_numpy(counts)[:, None]
    past = [torch.zeros(2, 4, 0, 16)] * 4
    given = (torch.from_numpy(layout[name]) for name in LAYOUT)
    positions = torch.arange(20).expand(2, -1)
    expected, _ = module(torch.from_numpy(tokens), positions, mask.long(), past, *given)
    np.testing.assert_allclose(found[mask.numpy()], expected[mask].numpy(), atol=2e-5)


def test_an_engine_is_told_the_segments(shared, tmp_path):
    """A stand-in for the engine, stepped here and from a bundle's arrays, agrees with onnxruntime in every scenario."""
    path = operated("cpmbee", "float32", shared) / "surgery" / "model.onnx"
    graph, proto = open_graph(path), load_graph(path)
    load_external_data_for_model(proto, str(weights_root(path)))
    description = build_graphs.describe(proto)
    engine = Engine(tmp_path / "model.engine", description, tmp_path, FakeEngine(proto), device="cpu")
    model = EngineModel("engine", signature_of(description), engine)
    assert signature_of(description) == graph.signature
    scenarios = make_scenarios(random_tokens(graph.vocab, 0), graph.capacity, None)
    comparison = compare(graph, model, scenarios)
    assert comparison.status == PASSED, [scenario.reason for scenario in comparison.scenarios]
    arrays = _expected(graph, scenarios[3], 0)
    assert {key for key in arrays if "/constant/" in key} == {f"0/constant/{name}" for name in LAYOUT}
    for key, value in arrays.items():
        if "segment_ids" in key:
            np.testing.assert_array_equal(value, made_up(("segment_ids",), 3, CAPACITY)["segment_ids"])


def test_buckets_of_the_published_models_are_the_source_formula():
    """As transformers computes them, far beyond the farthest distance."""
    for buckets, farthest in ((512, 2048), (256, 2048), (16, 24)):
        distances = torch.arange(-2 * farthest, 2 * farthest + 1)
        expected = SOURCE._position_bucket(distances, num_buckets=buckets, max_distance=farthest)
        table = bucket_table(buckets, farthest)
        assert torch.equal(table[distances.clamp(-farthest, farthest) + farthest], expected.long())


@pytest.mark.every
@pytest.mark.parametrize(("name", "dtype"), [("cpmant", "float16"), ("cpmbee", "bfloat16")])
def test_half_precision_agrees_and_builds(name, dtype, shared, tmp_path):
    """In bfloat16 a constant such as CPM-Bee's 1.05 would be far off."""
    out = operated(name, dtype, shared)
    assert [level["status"] for level in levels(out)[:3]] == [PASSED] * 3
    command = [sys.executable, "-m", "build", str(out / "surgery" / "model.trt.onnx"), "--out", str(tmp_path)]
    subprocess.run([*command, "--compute-capability", "8.9"], cwd=ROOT, check=True, capture_output=True)
    description = json.loads((tmp_path / "engine.json").read_text())
    assert description["signature"]["bidirectional"]
    assert {tensor["role"] for tensor in description["inputs"]} >= {"sequence_lengths", "positions"}


@pytest.mark.parametrize("name", ["cpmant", pytest.param("cpmbee", marks=pytest.mark.every)])
def test_a_deep_one_is_the_whole_trace(name, tmp_path):
    config = {"model_type": name, **FAMILIES[name].config, "num_hidden_layers": 5}  # one more than are traced
    repeated = trace(architecture(config, tmp_path), torch.float32)
    whole = trace(architecture(config, tmp_path), torch.float32, whole=True)
    assert [graph.metadata_props[TRACED_LAYERS] for graph in (repeated, whole)] == ["4", "5"]
    assert differences(plain_ir(whole), plain_ir(repeated)) == []


@pytest.mark.parametrize("name", ["cpmant", "cpmbee"])
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


def test_what_needs_more_than_text_says_so(shared):
    options = parse([str(operated("cpmbee", "float32", shared)), "--prompt", "x", "--runtime", "cpu"])
    with pytest.raises(UserError, match="is told more than text"):
        Generator(options)


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
