"""A LoRA adapter that peft saved, merged by export: the weights are those of peft's own merge_and_unload, and validate, which
opens the checkpoint again, finds the exported graph equal. Adapters that cannot be merged are refused."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from suture.core.command import DONE, FOUND_DIFFERENCE
from suture.core.errors import UserError
from suture.core.manifest import read_manifest
from suture.export import __main__ as command
from suture.models.architectures import open_checkpoint
from suture.validate.options import ValidateOptions
from suture.validate.stage import validate_pipeline
from tests import families
from tests.stored_traces import tracing_stored

CASES = {
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "qwen3": {
        "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 24},
        "modules_to_save": ["lm_head"],
    },
}


@pytest.fixture(scope="module", params=CASES)
def adapted(request, tmp_path_factory):
    """The family, its checkpoint, the adapter beside it, and peft's merged weights by name."""
    work = tmp_path_factory.mktemp(request.param)
    checkpoint = families.checkpoint(request.param, work)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **CASES[request.param])
    adapter = get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    adapter.save_pretrained(work / "adapter")
    return request.param, checkpoint, work / "adapter", adapter.merge_and_unload().state_dict()


def test_weights_are_those_that_peft_merges(adapted):
    family, checkpoint, adapter, expected = adapted
    plain, merged = open_checkpoint(checkpoint), open_checkpoint(checkpoint, adapter)
    differ = {name for name in plain.tensors if not torch.equal(plain.load(name), merged.load(name))}
    assert len(differ) == {"gpt2": 4, "qwen3": 8}[family]  # two layers; of qwen3 embedding and head, too
    for name in plain.tensors:
        torch.testing.assert_close(merged.load(name), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapted", ["gpt2"], indirect=True)  # of which there is a stored graph in float32
def test_export_merges_and_validate_opens_the_adapter_again(adapted, tmp_path):
    family, checkpoint, adapter, _ = adapted
    out = tmp_path / "out"
    arguments = ["--checkpoint", checkpoint, "--lora", adapter, "--weights", "reference", "--out", out / "export"]
    with tracing_stored(family, "float32"):
        command.main(list(map(str, arguments)))
        assert read_manifest(out / "export")["options"]["lora"] == str(adapter)
    assert validate_pipeline(out, ValidateOptions()) == DONE
    assert _status(out) == "passed"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 12}))
    assert validate_pipeline(out, ValidateOptions()) == FOUND_DIFFERENCE
    assert _status(out) == "different"
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def _status(out):
    report = json.loads((out / "validate" / "report.json").read_text())
    return next(level["status"] for level in report["levels"] if level["number"] == 1)


@pytest.mark.parametrize("adapted", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"config": {"peft_type": "IA3"}}, "describes an adapter that is IA3"),
        ({"config": {"use_dora": True}}, r"LoRA with magnitudes \(use_dora\)"),
        ({"config": {"r": "4"}}, "'r' is '4'"),
        ({"config": {"alpha_pattern": {"(a+)+": 1.0}}}, "which is no module's name"),
        ({"drop": "lora_B"}, "has one factor of .* and not the other"),
        ({"rename": ("h.0.", "h.7.")}, "has no place in the model"),
        ({"cut": True}, "do not fit"),
        ({"type": torch.int8}, "is of type I8"),
    ],
)
def test_what_cannot_be_merged_is_refused(change, reason, adapted, tmp_path):
    _, checkpoint, adapter, _ = adapted
    config = json.loads((adapter / "adapter_config.json").read_text()) | change.get("config", {})
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not ("drop" in change and change["drop"] in name)}
    tensors = {name.replace(*change.get("rename", ("", ""))): tensor.to(change.get("type")) for name, tensor in tensors.items()}
    if "cut" in change:
        tensors = {name: tensor[:, :-1].contiguous() for name, tensor in tensors.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=reason):
        open_checkpoint(checkpoint, tmp_path)
