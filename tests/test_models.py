"""Every family from a checkpoint as transformers saves it: its numbers are transformers' own, surgery fuses all of it, and
graph, portable graph and TensorRT's network agree. TensorRT builds engines of it in half precision."""

import json
from argparse import Namespace
from itertools import pairwise

import onnx
import pytest
import torch

from models import load_model, open_checkpoint
from tests.families import DECOMPOSED, FAMILIES, FUSED, checkpoint, counts, operated, reference, shared_folder
from validate.__main__ import validate_pipeline
from validate.compare import PASSED


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return shared_folder(tmp_path_factory)


def stepped(model, ids, mask, bounds):
    """Logits [B,S,vocab] of our model, the tokens between `bounds` a step."""
    dims = model.dimensions
    past = [torch.zeros(len(ids), dims.kv_heads, 0, dims.head_dim)] * (2 * dims.layers)
    positions, logits = (mask.cumsum(1) - 1).clamp(min=0), []
    for begin, end in pairwise(bounds):
        step, past = model(ids[:, begin:end], positions[:, begin:end], mask[:, :end], past)
        logits.append(step)
    return torch.cat(logits, dim=1)


def theirs(model, ids, mask, bounds):
    """The same from transformers' model with its own cache."""
    positions, logits, past = (mask.cumsum(1) - 1).clamp(min=0), [], None
    for begin, end in pairwise(bounds):
        given = {} if model.config.model_type == "mpt" else {"position_ids": positions[:, begin:end]}
        out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True, **given)
        past = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


DECODERS = [name for name in FAMILIES if name != "whisper"]


@pytest.mark.parametrize("name", DECODERS)
def test_numbers_are_transformers(name, shared):
    """Two rows, one of them padded, at once and from the cache, from the tensors that transformers saved."""
    ours, model = load_model(open_checkpoint(checkpoint(name, shared)), torch.float32), reference(name)
    torch.manual_seed(1)
    ids = torch.randint(3, ours.dimensions.vocab, (2, 21))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    valid = mask.bool()
    at_once, in_steps = [0, 21], [0, 12, 13, 14, 19, 20, 21]
    expected = theirs(model, ids, mask, at_once)[valid]
    assert expected.std() > 0.1
    for found in (stepped(ours, ids, mask, at_once), stepped(ours, ids, mask, in_steps)):
        torch.testing.assert_close(found[valid], expected, atol=2e-5, rtol=1e-4)
    decoded = theirs(model, ids, mask, [0, 12, *range(13, 22)])[valid]
    torch.testing.assert_close(stepped(ours, ids, mask, in_steps)[valid], decoded, atol=2e-5, rtol=1e-4)


def test_whispers_numbers_are_transformers(shared):
    """Two pieces of audio: the encoder's caches, then tokens at once and from the caches."""
    ours, model = load_model(open_checkpoint(checkpoint("whisper", shared)), torch.float32), reference("whisper")
    torch.manual_seed(1)
    dims, features = ours.dimensions, torch.randn(2, 8, 24)
    decoder, encoder = ours.parts()
    cross = encoder(features)
    assert {tuple(cache.shape) for cache in cross} == {(2, dims.kv_heads, dims.encoder_slots, dims.head_dim)}
    ids = torch.randint(3, dims.vocab, (2, 15))
    expected = model(input_features=features, decoder_input_ids=ids).logits
    assert expected.std() > 0.1
    assert (expected[0] - model(input_features=features[1:], decoder_input_ids=ids[:1]).logits[0]).abs().max() > 0.01
    for bounds in ([0, 15], [0, 9, 10, 11, 15]):
        past, logits = [torch.zeros(2, dims.kv_heads, 0, dims.head_dim)] * (2 * dims.layers), []
        for begin, end in pairwise(bounds):
            positions, mask = torch.arange(begin, end).expand(2, -1), torch.ones(2, end, dtype=torch.int64)
            step, past = decoder(ids[:, begin:end], positions, mask, [*past, *cross])
            logits.append(step)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=2e-5, rtol=1e-4)


def levels(out):
    """Status and worst error of levels 1, 2 and 3 of a pipeline's folder."""
    validate_pipeline(out, Namespace(text=None, tolerance=None, seed=0, force=False))
    report = json.loads((out / "validate" / "report.json").read_text())
    return report["levels"]


@pytest.mark.parametrize("name", FAMILIES)
def test_fuses_all_and_every_level_agrees(name, shared):
    out = operated(name, "float32", shared)
    portable = onnx.load(out / "surgery" / "model.onnx")
    assert counts(portable, FUSED) == FAMILIES[name].fused
    assert counts(portable, DECOMPOSED) == {}
    assert json.loads((out / "surgery" / "report.json").read_text())["unfused"] == []
    assert [level["status"] for level in levels(out)[:3]] == [PASSED] * 3
