"""Every family from a checkpoint as transformers saves it: its numbers are transformers' own, surgery fuses all of it, and
graph, portable graph and TensorRT's network agree. TensorRT builds engines of it in half precision."""

import json
from dataclasses import replace
from itertools import pairwise

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from suture.core.errors import UserError
from suture.core.parts import DECODER
from suture.core.signature import find_signature
from suture.core.weights import load_graph
from suture.export import stage as export
from suture.export.interface import decoder_interface
from suture.export.shallow import KEPT, without_middle
from suture.export.trace import TRACED_LAYERS, trace
from suture.models import named
from suture.models.architectures import architecture, load_model, open_checkpoint
from suture.models.named import read_config
from suture.models.parts import parts_of
from suture.surgery import __main__ as surgery
from suture.validate.compare import DIFFERENT, NOT_RUN, PASSED
from suture.validate.graph_part import graph_level
from suture.validate.pipeline import find_pipeline
from tests.families import (
    CAPABILITIES,
    DECOMPOSED,
    FAMILIES,
    FUSED,
    TYPES,
    build,
    checkpoint,
    counts,
    levels,
    operated,
    reference,
    surgered,
    worst,
)
from tests.test_export_repeat import plain_ir


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


DECODERS = [  # those left out are called otherwise: test_cpm.py
    name for name, family in FAMILIES.items() if family.model and name not in ("whisper", "cpmant", "cpmbee")
]


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


def test_a_window_of_some_layers_counts_a_rows_own_tokens(tmp_path):
    """Beside a longer row, decoding over padding between a row's tokens, it gets what it gets alone from transformers."""
    config = FAMILIES["qwen2"].config | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**config)).eval().requires_grad_(False)
    model.save_pretrained(tmp_path)
    ours = load_model(open_checkpoint(tmp_path), torch.float32)
    ids, mask = torch.randint(3, ours.dimensions.vocab, (2, 24)), torch.ones(2, 24, dtype=torch.int64)
    mask[1, 11:20] = 0
    found = stepped(ours, ids, mask, [0, 20, 21, 22, 24])
    for row, valid in enumerate(mask.bool()):
        alone = ids[row : row + 1, valid]
        expected = theirs(model, alone, torch.ones_like(alone), [0, alone.shape[1]])[0]
        torch.testing.assert_close(found[row, valid], expected, atol=2e-5, rtol=1e-4)


def test_whispers_numbers_are_transformers(shared):
    """Two pieces of audio: the encoder's caches, then tokens at once and from the caches."""
    ours, model = load_model(open_checkpoint(checkpoint("whisper", shared)), torch.float32), reference("whisper")
    torch.manual_seed(1)
    dims, features = ours.dimensions, torch.randn(2, 8, 24)
    encoder, decoder = (part.module for part in ours.parts())
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


HALVES = [("qwen3", "bfloat16")]  # looked at in every run of the tests
ALIKE = ("qwen2", "decicoder", "opt", "gptbigcode")  # LLaMA and GPT-2 once more
STORED = ("qwen", "llama", "mistral", "qwen3", "mpt")  # whose graphs, or one of that kind, the suite has from elsewhere
IN_EACH_RUN = [(name, "float32") for name in FAMILIES if name not in ALIKE + STORED] + HALVES
SLOW = [(name, "float32") for name in STORED]
TYPED = [
    pytest.param(
        name,
        dtype,
        marks=[] if (name, dtype) in IN_EACH_RUN else [pytest.mark.slow if (name, dtype) in SLOW else pytest.mark.every],
    )
    for name in FAMILIES
    for dtype in TYPES
]
BUILDS = [
    *(pytest.param(*typed.values, CAPABILITIES, marks=pytest.mark.every) for typed in TYPED),
    *((*half, "8.9") for half in HALVES),
]


@pytest.mark.parametrize(("name", "dtype"), TYPED)
def test_fuses_all_and_every_level_agrees(name, dtype, shared, record_property):
    out = operated(name, dtype, shared)
    for folder in surgered(out):
        assert counts(onnx.load(folder / "model.onnx"), DECOMPOSED) == {}
        assert json.loads((folder / "report.json").read_text())["unfused"] == []
    fused = counts(onnx.load(find_pipeline(out, None).decoder.portable), FUSED)
    assert fused == FAMILIES[name].fused
    found = levels(out)
    assert [level["status"] for level in found] == [PASSED] * (6 if name == "whisper" else 3)
    record_property("fused", ", ".join(f"{count} {op}" for op, count in fused.items()))
    for level, error in worst(found).items():
        record_property(level, error)


def test_levels_of_an_encoder_see_a_changed_graph(shared, tmp_path):
    """A graph with another GELU, in place of the portable one."""
    out = operated("whisper", "float32", shared)
    files = find_pipeline(out, None).parts[0]
    assert files.part.name == "encoder"
    changed = onnx.load(files.portable)
    gelus = [node for node in changed.graph.node if node.op_type == "Gelu"]
    assert len(gelus) == 4
    for node in gelus:
        node.attribute[0].CopyFrom(onnx.helper.make_attribute("approximate", "tanh"))
    onnx.save(changed, tmp_path / "model.onnx")
    other = replace(files, portable=tmp_path / "model.onnx")
    found = [graph_level(other, checkpoint("whisper", shared), None, 0, number) for number in (1, 2, 3, 4)]
    assert [level.status for level in found] == [PASSED, DIFFERENT, DIFFERENT, NOT_RUN]
    assert {output.output for output in found[1].comparison.scenarios[0].outputs} == {
        f"present.{layer}.encoder.{role}" for layer in (0, 1) for role in ("key", "value")
    }
    unfinished = [graph_level(replace(files, lowered=None), None, None, 0, number) for number in (1, 2, 3)]
    assert "is not here" in unfinished[0].reason
    assert "surgery has not been run" in unfinished[1].reason
    assert unfinished[2].reason == unfinished[1].reason


@pytest.mark.every
@pytest.mark.parametrize("name", FAMILIES)
def test_repeated_layers_are_the_whole_trace(name, shared):
    """Of a model of five layers, four are traced."""
    path = checkpoint(name, shared) / "config.json"
    repeated, whole = (
        trace(decoder(architecture(read_config(path, 5), path)), torch.float32, whole) for whole in (False, True)
    )
    assert [graph.metadata_props[TRACED_LAYERS] for graph in (repeated, whole)] == ["4", "5"]
    known = {}
    assert numbered(plain_ir(whole), known) == numbered(plain_ir(repeated), known)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_runs_without_its_middle(name, shared):
    """As it is traced: four layers of six."""
    path = checkpoint(name, shared) / "config.json"
    model = decoder(architecture(read_config(path, 6), path))
    few, _ = without_middle(model, 6)
    few.load_state_dict({key: torch.zeros(empty.shape) for key, empty in few.state_dict().items()}, assign=True)
    logits, presents = few(*decoder_interface(replace(model.dimensions, layers=KEPT), torch.float32).examples)
    assert logits.shape[2] == model.dimensions.vocab
    assert len(presents) == 2 * KEPT


def numbered(graph, known):
    """A number for what each output is computed by, the same for equal expressions over the same inputs and weights, in
    whichever order terms and factors stand."""
    constants = {name: (str(value.dtype), value.shape, value.tobytes()) for name, value in graph["constants"].items()}
    numbers = {name: known.setdefault(value, len(known)) for name, value in constants.items()}
    for op, attributes, reads, writes in graph["nodes"]:
        above = [numbers.get(name, name) for name in reads]
        above = tuple(sorted(above, key=str) if op in ("Add", "Mul") else above)
        for place, name in enumerate(writes):
            numbers[name] = known.setdefault((op, str(attributes), above, place), len(known))
    return [(name, numbers[name]) for name in graph["outputs"]]


def decoder(model):
    return next(part.module for part in parts_of(model) if part.kind == DECODER)


@pytest.mark.parametrize(("name", "dtype", "capabilities"), BUILDS)
def test_an_engine_is_built(name, dtype, capabilities, shared, record_property):
    """Of the decoder, and of an encoder where there is one."""
    for folder in surgered(operated(name, dtype, shared)):
        engine = build(folder, "--compute-capability", *capabilities.split())
        assert engine["compute_capabilities"] == capabilities.split()
        assert not [finding for finding in engine["findings"] if finding["severity"] == "error"]
    record_property("compute capabilities", ", ".join(capabilities.split()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_size": 63}, "hidden_size 63 is not a multiple of num_attention_heads 4"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type dynamic"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
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


def test_a_family_is_found_by_its_class_where_no_type_is_named():
    """As DeciCoder-1b's config.json has it; Aquila-7B's names the class without its head."""
    config = {**FAMILIES["decicoder"].config, "architectures": ["DeciCoderForCausalLM"]}
    assert type(architecture(config, "config.json")).__name__ == "Llama"
    assert type(architecture(config | {"architectures": ["Qwen3ForCausalLM"]}, "config.json")).__name__ == "Qwen3"
    aquila = {"model_type": "aquila", "architectures": ["AquilaModel"]}
    assert type(architecture(config | aquila, "config.json")).__name__ == "Llama"
    with pytest.raises(UserError, match=r"architecture None \(Other\) is not supported"):
        architecture(config | {"architectures": ["Other"]}, "config.json")


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


def test_a_preset_is_a_random_checkpoint_and_says_so(tmp_path, monkeypatch, capsys):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **FAMILIES["gpt2"].config}
    (tmp_path / "gpt2-tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr(named, "PRESETS", tmp_path)
    folder = export._named("gpt2-tiny", tmp_path / "out", "float16")
    assert "random ones of its dimensions" in capsys.readouterr().out
    assert open_checkpoint(folder).dtype == "float16"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert export._named("gpt2-tiny", tmp_path / "out", "float16") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="is none of tiny-codef, tiny-qwen, tiny-sam, tiny-sd, tiny-uniad, tiny-vlm, gpt2-tiny"):
        export._named("gpt2-large", tmp_path / "out", None)


def test_a_checkpoint_that_was_not_made_here_is_not_replaced(tmp_path, monkeypatch):
    """The published weights of a preset, where its random ones would go."""
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **FAMILIES["gpt2"].config}
    (tmp_path / "gpt2-tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr(named, "PRESETS", tmp_path)
    for name in ("config.json", "model.safetensors", "model-00001-of-00002.safetensors"):
        folder = tmp_path / name.split(".")[0] / "checkpoint"
        folder.mkdir(parents=True)
        (folder / name).write_text("{}")
        with pytest.raises(UserError, match="was not made here and would be replaced"):
            export._named("gpt2-tiny", folder.parent, "float16")
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "{}")]


def test_a_cache_is_no_longer_than_the_table_of_positions(shared, tmp_path):
    """GPT-2's table has 80 rows here: more slots are not made, and that is said."""
    exported = operated("gpt2", "float32", shared) / "export" / "model.onnx"
    assert find_signature(load_graph(exported)).learned_positions == 80
    surgery.main([str(exported), "--out", str(tmp_path)])
    assert find_signature(load_graph(tmp_path / "model.onnx")).capacity == 80
