"""The PyTorch Qwen-7B against outputs of the original implementation, and against an independent NumPy one."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from suture.core.signature import ntk_alpha
from suture.models.architectures import load_model, meta_model, open_checkpoint
from suture.models.dimensions import Dimensions
from suture.models.families.qwen import build
from suture.models.named import checkpoint_folder
from suture.models.tokenizer import open_tokenizer

SHARED = Path(__file__).parents[1].parent / "shared" / "qwen-7b"
REFERENCE = SHARED / "reference" / "tiny"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the original's outputs are not at {REFERENCE}")

CONFIG = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": 40, "hidden_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 3, "kv_channels": 8, "intermediate_size": 64, "seq_length": 6,
    "layer_norm_epsilon": 1e-6,
}  # fmt: skip


def empty_past(model, batch):
    dims = model.dimensions
    return [torch.zeros(batch, dims.kv_heads, 0, dims.head_dim)] * (2 * dims.layers)


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def alphas(model, mask):
    trained = model.dimensions.ntk_trained_length
    return torch.tensor([ntk_alpha(int(row.sum()), trained) for row in mask]) if trained else None


def in_one(model, ids, mask, alpha):
    return model(ids, positions_of(mask), mask, empty_past(model, len(ids)), alpha)[0]


def cached(model, ids, mask, prefill, alpha):
    """The prompt at once, then token by token from the cache."""
    positions, past, logits = positions_of(mask), empty_past(model, len(ids)), []
    bounds = [0, prefill, *range(prefill + 1, ids.shape[1] + 1)]
    for begin, end in pairwise(bounds):
        step, past = model(ids[:, begin:end], positions[:, begin:end], mask[:, :end], past, alpha)
        logits.append(step)
    return torch.cat(logits, dim=1)


def random_model(**switches):
    torch.manual_seed(0)
    model = build(CONFIG | switches, "test").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0.5 if parameter.dim() == 1 else 0, 0.3)
    return model


@needs_reference
@pytest.mark.parametrize("case", range(4))
def test_logits_are_the_originals(case):
    model = load_model(open_checkpoint(REFERENCE), torch.float32)
    expected = np.load(REFERENCE / "expected.npz")
    ids, mask = (torch.from_numpy(expected[f"{name}{case}"]) for name in ("ids", "mask"))
    prefill, valid = int(expected[f"prefill{case}"]), mask.bool()
    decoded = cached(model, ids, mask, prefill, alphas(model, mask[:, :prefill]))
    at_once = in_one(model, ids, mask, alphas(model, mask))
    for got, name in ((decoded, "logits"), (at_once, "full")):
        original = torch.from_numpy(expected[f"{name}{case}"])
        assert (got - original)[valid].abs().max() < 1e-4


@needs_reference
def test_reference_reaches_beyond_the_trained_length():
    """Else the test above would say nothing of NTK and log-n."""
    config = json.loads((REFERENCE / "config.json").read_text())
    expected = np.load(REFERENCE / "expected.npz")
    assert max(int(expected[f"prefill{case}"]) for case in range(4)) > config["seq_length"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real config and index are not at {SHARED}")
def test_real_checkpoint_has_the_models_names():
    """Names only: the 15 GB of weights are not at hand."""
    with torch.device("meta"):
        model = build(json.loads((SHARED / "config.json").read_text()), "test")
    names = json.loads((SHARED / "model.safetensors.index.json").read_text())["weight_map"]
    total = json.loads((SHARED / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert set(model.state_dict()) == set(names)
    assert sum(2 * tensor.numel() for tensor in model.state_dict().values()) == total


def numpy_logits(weights, config, ids, alpha):
    """Qwen-7B written again, token pair by token pair, from its published description."""
    heads, dim = config["num_attention_heads"], config["kv_channels"]
    trained = config["seq_length"]
    length = len(ids)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_epsilon"]) * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    base = 10000 * alpha ** (dim / (dim - 2))

    def turn(x, position):  # pairs (i, i + dim/2) as complex numbers
        pairs = x[: dim // 2] + 1j * x[dim // 2 :]
        turned = pairs * np.exp(1j * position * base ** (-np.arange(0, dim, 2) / dim))
        return np.concatenate([turned.real, turned.imag])

    x = weights["transformer.wte.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").reshape(length, 3, heads, dim)
        context = np.zeros((length, heads, dim))
        for head in range(heads):
            for i in range(length):
                query = turn(qkv[i, 0, head], i)
                if config.get("use_logn_attn", True) and i + 1 > trained:
                    query = query * np.log(i + 1) / np.log(trained)
                scores = np.array([query @ turn(qkv[j, 1, head], j) for j in range(i + 1)]) / np.sqrt(dim)
                weight = np.exp(scores - scores.max())
                context[i, head] = weight / weight.sum() @ qkv[: i + 1, 2, head]
        x = x + linear(context.reshape(length, -1), f"{at}.attn.c_proj")
        normed = norm(x, f"{at}.ln_2")
        gate = linear(normed, f"{at}.mlp.w2")
        x = x + linear(linear(normed, f"{at}.mlp.w1") * gate / (1 + np.exp(-gate)), f"{at}.mlp.c_proj")
    x = norm(x, "transformer.ln_f")
    return x @ weights.get("lm_head.weight", weights["transformer.wte.weight"]).T


@pytest.mark.parametrize(
    "switches",
    [{}, {"use_dynamic_ntk": False}, {"use_logn_attn": False}, {"no_bias": False}, {"tie_word_embeddings": True}],
    ids=lambda switches: ",".join(switches) or "defaults",
)
def test_switches_are_honoured(switches):
    """Beyond seq_length, each switch gives what an implementation of it gives, and not what the defaults give."""
    model = random_model(**switches)
    ids = torch.arange(15)[None] * 7 % 40
    mask = torch.ones_like(ids)
    alpha = alphas(model, mask)
    assert (alpha is None) == ("use_dynamic_ntk" in switches)
    got = in_one(model, ids, mask, alpha)[0].numpy()
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    config = CONFIG | switches
    scale = 1.0 if alpha is None else 7.0  # 15 tokens, trained on 6: 2^ceil(log2(2.5) + 1) - 1
    np.testing.assert_allclose(got, numpy_logits(weights, config, ids[0].numpy(), scale), atol=2e-4)
    if "use_dynamic_ntk" in switches or "use_logn_attn" in switches:
        other = numpy_logits(weights, CONFIG, ids[0].numpy(), 7.0)
        assert np.abs(got - other).max() > 0.01


def test_switches_change_nothing_within_the_trained_length():
    ids = torch.arange(6)[None] * 7 % 40
    mask = torch.ones_like(ids)
    plain = random_model(use_dynamic_ntk=False, use_logn_attn=False)
    scaled = random_model()
    torch.testing.assert_close(in_one(plain, ids, mask, None), in_one(scaled, ids, mask, torch.ones(1)))


def test_rows_of_a_batch_are_independent():
    """Left padding, and an alpha of its own per row, beyond seq_length."""
    model = random_model()
    ids = torch.arange(28).reshape(2, 14) * 3 % 40
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    alpha = alphas(model, mask)
    assert alpha.tolist() == [7, 1]
    together = in_one(model, ids, mask, alpha)
    alone = in_one(model, ids[1:, 9:], mask[1:, 9:], alpha[1:])
    torch.testing.assert_close(together[1:, 9:], alone, atol=1e-5, rtol=1e-5)


def test_chunks_and_decoding_agree_with_one_forward():
    model = random_model()
    ids = torch.arange(26).reshape(2, 13) * 5 % 40
    mask = torch.ones_like(ids)
    alpha = alphas(model, mask)
    torch.testing.assert_close(cached(model, ids, mask, 8, alpha), in_one(model, ids, mask, alpha), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(dtype):
    model, ids = random_model(), torch.arange(12)[None] * 7 % 40
    mask, alpha = torch.ones_like(ids), torch.tensor([3.0])
    exact = in_one(model, ids, mask, alpha)
    past = [tensor.to(dtype) for tensor in empty_past(model, 1)]
    logits, presents = model.to(dtype)(ids, positions_of(mask), mask, past, alpha)
    assert {tensor.dtype for tensor in (logits, *presents)} == {dtype}
    assert (logits.float() - exact).norm() / exact.norm() < (0.03 if dtype == torch.bfloat16 else 0.004)


@needs_reference
def test_meta_model_holds_nothing():
    model = meta_model(open_checkpoint(REFERENCE))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert not list(model.buffers())
    assert model.dimensions == Dimensions(
        layers=3, heads=6, kv_heads=6, head_dim=16, hidden=96, vocab=320, ntk_trained_length=24
    )


@pytest.mark.slow
def test_tiny_qwen_is_as_good_as_its_card_says():
    """Bits per byte of all its held-out text in windows of seq_length, against training.json and the card."""
    folder = checkpoint_folder("tiny-qwen")
    record = json.loads((folder / "training.json").read_text())["heldout_bits_per_byte"]
    model, tokenizer = load_model(open_checkpoint(folder), torch.float32), open_tokenizer(folder)
    ids = torch.tensor(tokenizer.encode((folder / "heldout.txt").read_text(encoding="utf-8")))
    length = model.dimensions.ntk_trained_length
    windows = torch.stack([ids[i : i + length + 1] for i in range(0, len(ids) - length, length)])
    nats = 0.0
    for part in windows.split(16):
        mask = torch.ones_like(part[:, :-1])
        logits = in_one(model, part[:, :-1], mask, alphas(model, mask))
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    bits = nats / math.log(2) / len(tokenizer.decode_bytes(windows[:, 1:].flatten().tolist()))
    assert bits == pytest.approx(record[str(length)], abs=1e-3)
    assert bits < 1.3
    card = (folder / "README.md").read_text()
    assert all(f"| {value:.3f} |" in card for value in record.values())
