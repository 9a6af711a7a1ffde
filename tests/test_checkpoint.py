"""Opening checkpoints: layouts that work, and damage that must be told in one line before any weight is read."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from suture.core.errors import UserError
from suture.models import families
from suture.models.architectures import architecture, load_model, meta_model, open_checkpoint
from suture.models.families.qwen import build
from suture.models.named import checkpoint_folder

CONFIG = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": 40, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "kv_channels": 8, "intermediate_size": 32, "seq_length": 6,
    "layer_norm_epsilon": 1e-6,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {name: tensor.to(torch.bfloat16) for name, tensor in build(CONFIG, "test").state_dict().items()}


@pytest.fixture
def folder(tmp_path, weights):
    """One file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(folder, weights):
    (folder / "model.safetensors").unlink()
    place = {name: SHARDS[i % 2] for i, name in enumerate(weights)}
    for shard in SHARDS:
        save_file({name: weights[name] for name in place if place[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def refused(folder, action=open_checkpoint):
    """The one line that a damaged checkpoint gets."""
    with pytest.raises(UserError) as error:
        action(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def read_meta(folder):
    return meta_model(open_checkpoint(folder))


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_opens_and_loads(layout, weights, request):
    checkpoint = open_checkpoint(request.getfixturevalue(layout))
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.config == CONFIG
    assert set(checkpoint.tensors) == set(weights)
    for name, tensor in weights.items():
        entry = checkpoint.tensors[name]
        assert (entry.dtype, entry.shape) == ("bfloat16", tuple(tensor.shape))
        stored = entry.file.read_bytes()[entry.offset : entry.offset + entry.length]
        assert stored == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert torch.equal(checkpoint.load(name), tensor)
    loaded = load_model(checkpoint, torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in weights.items())


def test_opens_a_hugging_face_cache(sharded, tmp_path):
    """snapshots/<revision>/NAME are symbolic links to ../../blobs/<sha>."""
    cache = tmp_path / "models--owner--name"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", INDEX, *SHARDS)):
        shutil.move(sharded / name, blobs / f"{number:064}")
        (snapshot / name).symlink_to(f"../../blobs/{number:064}")
    checkpoint = open_checkpoint(snapshot)
    assert {entry.file.parent for entry in checkpoint.tensors.values()} == {snapshot}
    load_model(checkpoint, torch.float32)


def test_dtype_is_the_one_with_most_bytes(folder, weights):
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].float()
    weights["positions"] = torch.zeros(100_000, dtype=torch.int64)
    save_file(weights, folder / "model.safetensors")
    assert open_checkpoint(folder).dtype == "bfloat16"


def test_missing_folder(tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere")


def test_missing_config(folder):
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refused(folder)


def test_config_is_no_json(folder):
    (folder / "config.json").write_text("{")
    assert "is not JSON" in refused(folder)


def test_config_lacks_a_key(folder):
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "seq_length"}))
    assert "has no 'seq_length'" in refused(folder, read_meta)


def test_partial_rotary_is_refused(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rotary_pct": 0.5}))
    assert "rotary_pct 0.5 is not supported" in refused(folder, read_meta)


def test_missing_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    assert f"{SHARDS[1]}: no such file" in refused(sharded)


@pytest.mark.parametrize("kept", [0.99, 0.02], ids=["in the data", "in the header"])
def test_truncated_shard(sharded, kept):
    shard = sharded / SHARDS[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(kept * len(content))])
    assert f"{SHARDS[0]}: truncated" in refused(sharded)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 9) + b"not json!",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}  ' + bytes(4),
    ],
    ids=["empty", "short", "huge header", "no json", "no object", "shape and size disagree"],
)
def test_corrupt_header(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert "header is corrupt" in refused(folder)


def test_index_lies(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["transformer.wte.weight"] = SHARDS[1]
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"{SHARDS[1]}: has no tensor transformer.wte.weight" in refused(sharded)


def test_index_leads_outside(sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "names a shard outside its folder" in refused(sharded)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemError('code from a checkpoint ran')",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt", "model.pth"])
def test_pickle_is_refused_and_not_read(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    assert f"{name}: is a pickle" in (line := refused(folder))
    assert "suture convert FILE OUT" in line


def test_pickle_under_a_safetensors_name(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert "header is corrupt" in refused(folder)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor" in refused(folder)


def test_missing_tensor(folder, weights):
    del weights["transformer.h.1.mlp.w2.weight"]
    save_file(weights, folder / "model.safetensors")
    assert "has no tensor transformer.h.1.mlp.w2.weight" in refused(folder, read_meta)


def test_wrong_shape(folder, weights):
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].contiguous()
    save_file(weights, folder / "model.safetensors")
    line = refused(folder, read_meta)
    assert "lm_head.weight has shape [39, 16], but config.json asks for [40, 16]" in line


def test_a_family_is_the_file_called_after_its_model_type(tmp_path, monkeypatch):
    code = "from torch import nn\nARCHITECTURES, PREFIX = ('Own',), ''\ndef build(config, where):\n    return nn.Linear(2, 3)\n"
    (tmp_path / "somebodys.py").write_text(code)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    made = architecture({"model_type": "somebodys", "architectures": ["Own"]}, tmp_path)
    assert made.weight.shape == (3, 2)


@pytest.mark.parametrize(
    "change",
    [{"model_type": "dinov2", "architectures": ["Dinov2Model"]}, {"architectures": ["QWenForVision"]}],
    ids=["type", "class"],
)
def test_unknown_architecture(folder, change):
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    line = refused(folder, read_meta)
    assert change["architectures"][0] in line
    assert "supported: aquila (" in line
    assert " qwen (QWenLMHeadModel)," in line


def test_unknown_name():
    assert "tiny-qwen" in refused("no-such-model", checkpoint_folder)
