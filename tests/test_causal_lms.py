"""Any causal language model of transformers, from a checkpoint in the layout in which transformers publishes it: its exported graph
against transformers' own logits, what surgery fuses, and TensorRT's network against the portable graph."""

import json

import onnx
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from suture.core.errors import UserError
from suture.export.options import ExportOptions
from suture.export.stage import export
from suture.models.architectures import load_model, open_checkpoint
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan
from tests.causal_lms import error_of, tiny_config, write_checkpoint
from tests.test_network_families import network_error

pytestmark = pytest.mark.exports
WITHIN = 1e-5  # of the largest value
llama = {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4, "Swish": 2, "TensorScatter": 4}
normed = llama | {"RMSNormalization": 9}
gpt = {"Attention": 2, "LayerNormalization": 5, "Gelu": 2, "TensorScatter": 4}
FUSED = {  # at two layers
    "gemma2": {"Attention": 2, "RMSNormalization": 9, "RotaryEmbedding": 4, "Gelu": 2, "TensorScatter": 4},  # a soft cap
    "qwen3_moe": normed,
    "gpt_oss": llama | {"Attention": 0},  # sinks in the softmax
    "deepseek_v3": {"RMSNormalization": 9, "Swish": 3},  # multi-head latent attention
    "phi3": llama,
    "stablelm": {
        "LayerNormalization": 5,
        "Attention": 2,
        "RotaryEmbedding": 4,
        "Swish": 2,
        "TensorScatter": 4,
    },  # partial rotary
    "bloom": gpt | {"LayerNormalization": 6},  # ALiBi; products over batch and heads in one axis
    "xglm": gpt,  # positions in a table of sines; products as bloom's
    "gemma3_text": {"Attention": 2, "RMSNormalization": 13, "RotaryEmbedding": 4, "Gelu": 2, "TensorScatter": 4},
    "olmo2": normed,
}
IN_SUITE = ("qwen3_moe",)


@pytest.mark.parametrize("name", [name if name in IN_SUITE else pytest.param(name, marks=pytest.mark.slow) for name in FUSED])
def test_from_checkpoint_to_network(name, tmp_path):
    write_checkpoint(tiny_config(name), tmp_path / "checkpoint")
    export(tmp_path / "export", ExportOptions(checkpoint=tmp_path / "checkpoint", dtype="float32"))
    assert error_of(tmp_path / "export" / "model.onnx", tmp_path / "checkpoint") < WITHIN
    plan = make_plan(SurgeryOptions(capacity=64))
    portable, lowered, _ = run_plan(files.read(tmp_path / "export" / "model.onnx"), plan)
    beside = tmp_path / "export" / "portable.onnx", tmp_path / "export" / "lowered.onnx"  # beside the weights
    for graph, path in zip((portable, lowered), beside):
        files.write(graph, path)
    written = onnx.load(beside[0], load_external_data=False)
    counts = {op: sum(node.op_type == op for node in written.graph.node) for op in FUSED[name]}
    assert counts == FUSED[name]
    assert network_error(*beside) < WITHIN


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_neox"])
def test_tensors_are_found_under_the_published_names(name, tmp_path):
    """Experts that lie apart, another name for the head: each tensor is the one that transformers loads."""
    write_checkpoint(tiny_config(name), tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    checkpoint = open_checkpoint(tmp_path)
    found = load_model(checkpoint, torch.float32).state_dict()
    assert found
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert bool(checkpoint.joined) == (name != "gpt_neox")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bamba", "has layers of type linear_attention, which keep something else than keys and values"),
        ("falcon_mamba", "keeps no KV cache"),
        ("deepseek_v32", "has layers of type indexed_attention"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(name, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(name)))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=reason):
        open_checkpoint(tmp_path)


def test_a_window_counts_a_rows_own_tokens(tmp_path):
    """A row that stands beside a longer one, padding in front, gets what it gets alone; transformers' own count is of slots."""
    write_checkpoint(tiny_config("gemma2"), tmp_path)
    model = load_model(open_checkpoint(tmp_path), torch.float32)
    tokens = torch.arange(3, 15)[None]
    past = [torch.zeros(1, 2, 0, 16) for _ in range(2 * model.dimensions.layers)]
    with torch.no_grad():
        alone, _ = model(tokens, torch.arange(12)[None], torch.ones(1, 12, dtype=torch.int64), past)
        gap = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
        padded, places = torch.zeros(1, 18, dtype=torch.int64), torch.zeros(1, 18, dtype=torch.int64)
        padded[gap == 1], places[gap == 1] = tokens[0], torch.arange(12)
        beside, _ = model(padded, places, gap, past)
    torch.testing.assert_close(beside[gap == 1], alone[0], rtol=0, atol=1e-5 * float(alone.abs().max()))
