"""Export: the graph computes what torch does, and refers to or copies its weights."""

import hashlib
import json
import os
import shutil

import numpy as np
import onnx
import pytest
import torch
from exporting import CONFIG, both, export, overwritten, session, sum_of_bytes

from suture.core.errors import UserError
from suture.core.manifest import read_manifest
from suture.core.weights import check_references, weights_root
from suture.export import weights as export_weights
from suture.models.architectures import load_model, open_checkpoint
from suture.models.random_weights import write


@pytest.mark.parametrize(
    ("mask", "steps", "alpha"),
    [
        pytest.param([[1] * 7], 7, [1.0], id="prompt"),
        pytest.param([[1] * 9, [1] * 9], 1, [1.0, 1.0], id="decode"),
        pytest.param([[0, 0, 0, 1, 1, 1], [1] * 6], 6, [1.0, 1.0], id="left-padded prompt"),
        pytest.param([[0, 0, 0, 1, 1, 1], [1] * 6], 1, [1.0, 1.0], id="left-padded decode"),
        pytest.param([[1] * 40, [0] * 20 + [1] * 20], 9, [7.0, 3.0], id="beyond the trained length"),
    ],
)
def test_graph_computes_what_torch_does(exported, checkpoint, mask, steps, alpha):
    for ours, theirs in both(exported, checkpoint, mask, steps, alpha):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4)


def test_one_disturbed_weight_shows(exported, checkpoint, tmp_path):
    """That the comparison above can fail, for a weight of a layer that was never traced."""
    name = "transformer.h.3.mlp.w1.weight"
    zeros = bytes(open_checkpoint(checkpoint).tensors[name].length // 8)
    other = overwritten(checkpoint, tmp_path / "checkpoint", name, zeros)
    pairs = both(exported, other, [[1] * 7], 7, [1.0])
    assert not np.allclose(*pairs[0], atol=1e-3)
    assert np.allclose(*pairs[2 * 3], atol=2e-5)  # the value cache of layer 2, before it
    assert not np.allclose(*pairs[-1], atol=1e-3)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_reference_leaves_the_bytes_where_they_are(exported, checkpoint):
    manifest = read_manifest(exported.parent)
    assert manifest["weights"] == "reference"
    assert (manifest["bytes_copied"], manifest["bytes_referenced"]) == (0, sum_of_bytes(checkpoint))
    assert sorted(path.name for path in exported.parent.iterdir()) == ["manifest.json", "model.onnx"]
    assert weights_root(exported) == checkpoint.resolve()


def test_copy_stands_alone(traced_before, checkpoint, tmp_path):
    moved = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, moved)
    model = export(moved, tmp_path / "out")  # below 2 GB, so a copy
    manifest = read_manifest(model.parent)
    assert (manifest["weights"], manifest["weights_root"]) == ("copy", ".")
    assert manifest["bytes_copied"] == sum_of_bytes(checkpoint)
    shutil.rmtree(moved)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    for ours, theirs in both(tmp_path / "elsewhere" / "model.onnx", checkpoint, [[1] * 7], 7, [1.0]):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4)


def test_hugging_face_cache(traced_before, checkpoint, tmp_path):
    """snapshots/<commit>/name is a symbolic link to blobs/<sha256>; nothing is copied."""
    repository = tmp_path / "models--some--model"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in checkpoint.iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    model = export(snapshot, tmp_path / "out", weights="reference")
    assert weights_root(model) == blobs
    check_references(onnx.load(model, load_external_data=False), model)
    for ours, theirs in both(model, snapshot, [[1] * 7], 7, [1.0]):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_half_precision(dtype, tmp_path):
    """All floats of the graph's interface have the type asked for; float16 computes what float32 does, roughly."""
    checkpoint = tmp_path / "checkpoint"
    write(CONFIG | {"num_hidden_layers": 1}, checkpoint, "bfloat16", seed=2)
    model = export(checkpoint, tmp_path / "out", dtype=dtype, weights="reference")
    copied = 0 if dtype == "bfloat16" else sum_of_bytes(checkpoint)  # what the checkpoint has not, is converted
    assert read_manifest(model.parent)["bytes_copied"] == copied
    proto = onnx.load(model, load_external_data=False)
    kind = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[dtype]
    types = {value.name: value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)}
    assert types.pop("ntk_alpha") == onnx.TensorProto.FLOAT
    assert {name: types.pop(name) for name in ("input_ids", "position_ids", "attention_mask")}.keys()
    assert set(types.values()) == {kind}
    if dtype == "float16":  # onnxruntime's CPU does not compute in bfloat16
        module = load_model(open_checkpoint(checkpoint), torch.float32)
        ids, ones = torch.arange(7)[None], torch.ones(1, 7, dtype=torch.int64)
        with torch.no_grad():
            exact = module(ids, ids, ones, [torch.zeros(1, 4, 0, 16)] * 2, torch.ones(1))[0].numpy()
        empty = np.zeros((1, 4, 0, 16), np.float16)
        feeds = {"input_ids": ids.numpy(), "position_ids": ids.numpy(), "attention_mask": ones.numpy()}
        feeds |= {"ntk_alpha": np.ones(1, np.float32)}
        feeds |= {"past_key_values.0.key": empty, "past_key_values.0.value": empty}
        found = session(model).run(["logits"], feeds)[0].astype(np.float32)
        assert np.linalg.norm(found - exact) < 5e-3 * np.linalg.norm(exact)


def test_values_beyond_float16_are_refused(traced_before, checkpoint, tmp_path):
    other = overwritten(checkpoint, tmp_path / "checkpoint", "lm_head.weight", np.float32(1e6).tobytes())
    with pytest.raises(UserError, match=r"lm_head.weight has values that float16 cannot hold; .*bfloat16"):
        export(other, tmp_path / "out", dtype="float16")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("weights", ["copy", "reference"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_value_that_is_no_number_is_said(value, weights, traced_before, checkpoint, tmp_path, capsys):
    other = overwritten(checkpoint, tmp_path / "checkpoint", "lm_head.weight", np.float32(value).tobytes())
    out = export(other, tmp_path / "out", weights=weights)
    assert "export: lm_head.weight has NaN or infinite values" in capsys.readouterr().out
    assert json.loads(out.with_name("manifest.json").read_text())["not_finite"] == ["lm_head.weight"]


def test_too_little_space(traced_before, checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(export_weights.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"no space left: .*--weights reference"):
        export(checkpoint, tmp_path / "out", weights="copy")
    assert list((tmp_path / "out").iterdir()) == []
