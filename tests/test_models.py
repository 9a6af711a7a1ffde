"""Every family from a checkpoint as transformers saves it: its numbers are transformers' own, surgery fuses all of it, and
graph, portable graph and TensorRT's network agree. TensorRT builds engines of it in half precision."""

import json
from argparse import Namespace
from itertools import pairwise

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import export.__main__ as export
import surgery.__main__ as surgery
from contracts.errors import UserError
from contracts.signature import find_signature
from contracts.weights import load_graph
from models import architecture, load_model, open_checkpoint, random_checkpoint
from models.random_checkpoint import PRESETS, presets, read_config
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_size": 63}, "refused by transformers"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type dynamic"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"architectures": ["SomethingElse"]}, "is not supported"),
    ],
)
def test_an_unusable_config_gets_one_line(change, said):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **FAMILIES["llama"].config} | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(UserError) as error:
        architecture(config, "config.json")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_tensors_saved_without_the_heads_prefix_are_found(shared, tmp_path):
    """As gpt2's own checkpoint names them, and with a tensor that no model has any more."""
    folder = checkpoint("gpt2", shared)
    stored = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    assert "wte.weight" in bare
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 80, 80)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    models = [load_model(open_checkpoint(each), torch.float32).state_dict() for each in (folder, tmp_path)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


PUBLISHED = {"llama-2-7b": 6_738_415_616, "mistral-7b": 7_248_023_552, "qwen2.5-7b": 7_615_616_512, "qwen3-8b": 8_190_735_360,
             "gpt2-medium": 354_823_168, "mpt-7b": 6_649_286_656, "whisper-large-v2": 1_543_304_960}  # fmt: skip


@pytest.mark.parametrize("preset", presets())
def test_presets_are_models_of_a_supported_family(preset):
    path = PRESETS / f"{preset}.json"
    model = architecture(read_config(path), path)
    size = sum(tensor.numel() for tensor in model.state_dict().values())
    assert size == PUBLISHED.get(preset, size)
    assert size > 4e8 or preset in ("gpt2-medium", "whisper-small")


def test_a_preset_is_a_random_checkpoint_and_says_so(tmp_path, monkeypatch, capsys):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **FAMILIES["gpt2"].config}
    (tmp_path / "gpt2-tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr(random_checkpoint, "PRESETS", tmp_path)
    folder = export._named("gpt2-tiny", tmp_path / "out", "float16")
    assert "random ones of its dimensions" in capsys.readouterr().out
    assert open_checkpoint(folder).dtype == "float16"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert export._named("gpt2-tiny", tmp_path / "out", "float16") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="is none of tiny-qwen, gpt2-tiny"):
        export._named("gpt2-large", tmp_path / "out", None)


def test_a_cache_is_no_longer_than_the_table_of_positions(shared, tmp_path):
    """GPT-2's table has 80 rows here: more slots are not made, and that is said."""
    exported = operated("gpt2", "float32", shared) / "export" / "model.onnx"
    assert find_signature(load_graph(exported)).learned_positions == 80
    surgery.main([str(exported), "--out", str(tmp_path)])
    assert find_signature(load_graph(tmp_path / "model.onnx")).capacity == 80
