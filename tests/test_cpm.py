"""CPM, whose prompt sees itself in both directions: CPM-Ant's numbers are transformers', CPM-Bee's the original's formulas."""

import functools
import math

import pytest
import torch

from suture.core.cpm_inputs import MOST_SEGMENTS
from suture.core.errors import UserError
from suture.models.architectures import architecture, load_model, open_checkpoint
from suture.models.cpm import bucket_table
from tests.families import FAMILIES, checkpoint, reference

PREFIX = FAMILIES["cpmant"].config["prompt_length"]


@functools.cache
def source() -> torch.nn.Module:
    """transformers' formula of CPM-Ant's buckets, CPM-Bee's too."""
    from transformers import CpmAntConfig
    from transformers.models.cpmant.modeling_cpmant import CpmAntSegmentPositionEmbedding

    return CpmAntSegmentPositionEmbedding(CpmAntConfig(num_attention_heads=1))


def padded(rows: list[torch.Tensor], left: bool) -> torch.Tensor:
    """Rows of any lengths as one int64 tensor, 0 elsewhere."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left" if left else "right")


@pytest.mark.seconds
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
    inner = source()._position_bucket(positions[None, :] - position[:, None], num_buckets=buckets, max_distance=farthest)
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


@pytest.mark.seconds
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


def test_buckets_of_the_published_models_are_the_source_formula():
    """As transformers computes them, far beyond the farthest distance."""
    for buckets, farthest in ((512, 2048), (256, 2048), (16, 24)):
        distances = torch.arange(-2 * farthest, 2 * farthest + 1)
        expected = source()._position_bucket(distances, num_buckets=buckets, max_distance=farthest)
        table = bucket_table(buckets, farthest)
        assert torch.equal(table[distances.clamp(-farthest, farthest) + farthest], expected.long())


def test_unusable_configs_get_one_line(tmp_path):
    config = {"model_type": "cpmant", **FAMILIES["cpmant"].config}
    for change, said in (({"dim_ff": None}, "has no 'dim_ff'"), ({"mask_modules": [[True, False]]}, "pruned")):
        with pytest.raises(UserError, match=said):
            architecture(config | change, tmp_path / "config.json")
