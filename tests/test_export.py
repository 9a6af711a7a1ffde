"""Export: the graph computes what torch does, refers to or copies its weights, and leaves nothing behind where it fails."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from filelock import FileLock

import export.__main__ as stage
import export.weights as export_weights
from contracts.errors import UserError
from contracts.manifest import read_manifest
from contracts.weights import ORT_ROOT_OPTION, check_references, weights_root
from export.repeat import LayersDiffer, repeat
from export.shallow import without_middle
from export.trace import SCOPES, TRACED_LAYERS, trace
from models import architecture, load_model, open_checkpoint
from models.random_checkpoint import write

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 5  # one more than are traced
CONFIG = json.loads((ROOT / "models" / "tiny-qwen" / "config.json").read_text()) | {
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "kv_channels": 16,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 99,
    "seq_length": 16,
}


def export(checkpoint: Path, out: Path, **given: object) -> Path:
    options = {"model": None, "dtype": None, "weights": None, "force": False} | given
    stage.export(Namespace(checkpoint=checkpoint, out=out, **options))
    return out / "model.onnx"


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of a run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "export"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def checkpoint(shared) -> Path:
    """Five layers, float32, in two shards."""
    with FileLock(shared / "checkpoint.lock"):
        if not (shared / "checkpoint" / "config.json").exists():
            write(CONFIG, shared / "checkpoint", "float32", seed=1, shard_bytes=400_000)
    return shared / "checkpoint"


@pytest.fixture(scope="session")
def exported(shared, checkpoint) -> Path:
    with FileLock(shared / "exported.lock"):
        return export(checkpoint, shared / "exported", weights="reference")  # up to date for all workers but the first


def session(model: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(ORT_ROOT_OPTION, str(weights_root(model)))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def both(model: Path, checkpoint: Path, mask: list[list[int]], steps: int, alpha: list[float]) -> list[tuple]:
    """Random tokens into the graph and into torch, the last `steps` columns of `mask` after a cache of random values;
    each output from both, rows of padding left out."""
    opened = open_checkpoint(checkpoint)
    module = load_model(opened, torch.float32)
    dims = module.dimensions
    mask = torch.tensor(mask)
    rows, total = mask.shape
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(dims.vocab, (rows, steps), generator=generator)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -steps:]
    shape = rows, dims.kv_heads, total - steps, dims.head_dim
    past = [torch.randn(shape, generator=generator) for _ in range(2 * dims.layers)]
    alphas = torch.tensor(alpha)
    with torch.no_grad():
        logits, presents = module(ids, positions, mask, past, alphas)
    names = [f"past_key_values.{i}.{role}" for i in range(dims.layers) for role in ("key", "value")]
    feeds = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "ntk_alpha": alphas, **dict(zip(names, past))}
    found = session(model).run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    valid = mask[:, -steps:].bool()
    pairs = [(found[0][valid], logits[valid].numpy())]
    return pairs + [(ours, theirs.numpy()) for ours, theirs in zip(found[1:], presents)]


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
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    entry = open_checkpoint(other).tensors["transformer.h.3.mlp.w1.weight"]
    with open(entry.file, "r+b") as file:
        file.seek(entry.offset)
        file.write(bytes(entry.length // 8))
    pairs = both(exported, other, [[1] * 7], 7, [1.0])
    assert not np.allclose(*pairs[0], atol=1e-3)
    assert np.allclose(*pairs[2 * 3], atol=2e-5)  # the value cache of layer 2, before it
    assert not np.allclose(*pairs[-1], atol=1e-3)


# --- layers traced twice and written often ---------------------------------------------------------------------------


def test_repeated_layers_are_the_whole_trace(exported, tmp_path):
    repeated = onnx.load(exported, load_external_data=False)
    assert {entry.key: entry.value for entry in repeated.metadata_props}[TRACED_LAYERS] == "4"
    whole = trace(architecture(CONFIG, tmp_path), torch.float32, whole=True)
    assert whole.metadata_props[TRACED_LAYERS] == str(LAYERS)
    assert differences(plain_ir(whole), plain_proto(repeated)) == []
    node = next(node for node in whole.graph if node.op_type == "Sigmoid" and "h.1." in node.metadata_props[SCOPES])
    node.op_type = "Tanh"
    with pytest.raises(LayersDiffer, match=r"Tanh .* of layer 1 is not Sigmoid"):
        repeat(whole.graph, 7, "transformer.h")


def plain_proto(model: onnx.ModelProto) -> dict:
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.data_location == 0}
    nodes = [
        (n.op_type, {a.name: repr(onnx.helper.get_attribute_value(a)) for a in n.attribute}, list(n.input), list(n.output))
        for n in model.graph.node
    ]
    names = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    return {"inputs": names[0], "outputs": names[1], "nodes": nodes, "constants": constants}


def plain_ir(model: ir.Model) -> dict:
    graph = model.graph
    constants = {name: v.const_value.numpy() for name, v in graph.initializers.items() if v.const_value is not None}
    nodes = []
    for node in graph:
        attributes = {}
        for name, attribute in node.attributes.items():
            value = attribute.value
            attributes[name] = repr(list(value) if isinstance(value, tuple) else value)
        reads = ["" if value is None else value.name for value in node.inputs]
        nodes.append((node.op_type, attributes, reads, [value.name for value in node.outputs]))
    return {
        "inputs": [value.name for value in graph.inputs],
        "outputs": [value.name for value in graph.outputs],
        "nodes": nodes,
        "constants": constants,
    }


def differences(one: dict, other: dict) -> list[str]:
    """Where two graphs are not the same up to the names of what lies between inputs, weights and outputs."""
    found = [f"{key}: {one[key]} and {other[key]}" for key in ("inputs", "outputs") if one[key] != other[key]]
    found += [] if len(one["nodes"]) == len(other["nodes"]) else ["different numbers of nodes"]
    producers = [{name: (i, node) for i, node in enumerate(graph["nodes"]) for name in node[3]} for graph in (one, other)]
    partner: dict[int, int] = {}
    waiting = list(zip(one["outputs"], other["outputs"]))
    while waiting and not found:
        a, b = waiting.pop()
        (i, first), (j, second) = (made.get(name, (None, None)) for made, name in zip(producers, (a, b)))
        if first is None or second is None:
            constants = one["constants"].get(a), other["constants"].get(b)
            equal = a == b or (all(c is not None for c in constants) and np.array_equal(*constants))
            found += [] if equal and first is second else [f"{a} and {b}"]
        elif i in partner:
            found += [] if partner[i] == j else [f"{a} is made by another node than {b}"]
        else:
            partner[i] = j
            same = first[:2] == second[:2] and len(first[2]) == len(second[2]) and first[3].index(a) == second[3].index(b)
            found += [] if same else [f"{first} and {second}"]
            waiting += zip(first[2], second[2])
    if not found and (len(set(partner.values())) != len(partner) or len(partner) != len(one["nodes"])):
        found.append("nodes that nothing reaches, or that two nodes of the other stand for")
    return found


def test_the_comparison_of_graphs_sees_a_changed_edge(exported):
    model = onnx.load(exported, load_external_data=False)
    changed = onnx.load(exported, load_external_data=False)
    rotated = [node for node in changed.graph.node if node.op_type == "Neg"]
    rotated[-1].input[0] = rotated[-2].input[0]
    assert differences(plain_proto(model), plain_proto(model)) == []
    assert differences(plain_proto(model), plain_proto(changed)) != []


@pytest.mark.parametrize("layer", [1, 2, LAYERS - 2])
def test_layers_that_differ_are_traced_one_by_one(layer):
    model = architecture(CONFIG, Path("config.json"))
    assert without_middle(model, LAYERS) is not None
    model.transformer.h[layer].ln_2.epsilon = 1e-3
    assert without_middle(model, LAYERS) is None


def test_few_layers_are_traced_whole():
    assert without_middle(architecture(CONFIG | {"num_hidden_layers": 4}, Path("config.json")), 4) is None


# --- weights ---------------------------------------------------------------------------------------------------------


def test_reference_leaves_the_bytes_where_they_are(exported, checkpoint):
    manifest = read_manifest(exported.parent)
    assert manifest["weights"] == "reference"
    assert (manifest["bytes_copied"], manifest["bytes_referenced"]) == (0, sum_of_bytes(checkpoint))
    assert sorted(path.name for path in exported.parent.iterdir()) == ["manifest.json", "model.onnx"]
    assert weights_root(exported) == checkpoint.resolve()


def sum_of_bytes(checkpoint: Path) -> int:
    return sum(entry.length for entry in open_checkpoint(checkpoint).tensors.values())


@pytest.fixture
def traced_before(exported, monkeypatch) -> None:
    """Makes export use the graph that was traced before: what these tests are about comes after."""
    monkeypatch.setattr(stage, "trace", lambda model, dtype: traced(exported, dtype))


def traced(exported: Path, dtype: torch.dtype) -> ir.Model:
    proto = onnx.load(exported, load_external_data=False)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.data_type = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}[dtype]
    return ir.from_proto(proto)


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
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
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    entry = open_checkpoint(other).tensors["lm_head.weight"]
    with open(entry.file, "r+b") as file:
        file.seek(entry.offset)
        file.write(np.float32(1e6).tobytes())
    with pytest.raises(UserError, match=r"lm_head.weight has values that float16 cannot hold; .*bfloat16"):
        export(other, tmp_path / "out", dtype="float16")
    assert list((tmp_path / "out").iterdir()) == []


def test_too_little_space(traced_before, checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(export_weights.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"no space left: .*--weights reference"):
        export(checkpoint, tmp_path / "out", weights="copy")
    assert list((tmp_path / "out").iterdir()) == []


# --- runs ------------------------------------------------------------------------------------------------------------


def without_second_shard(folder: Path) -> None:
    next(folder.glob("*00002-of*")).unlink()


DAMAGES = {
    "is missing": without_second_shard,
    "truncated": lambda folder: os.truncate(next(folder.glob("*00002-of*")), 5000),
    "no such file": lambda folder: (folder / "config.json").unlink(),
    "no such folder": shutil.rmtree,
}


@pytest.mark.parametrize("says", DAMAGES)
def test_unusable_checkpoints_are_refused(checkpoint, tmp_path, says):
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    DAMAGES[says](other)
    with pytest.raises(UserError, match=says):
        export(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_so_in_one_line(checkpoint, tmp_path):
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    without_second_shard(other)
    line = [sys.executable, "-m", "export", "--checkpoint", str(other), "--out", str(tmp_path / "out")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("export: ")
    assert done.stderr.count("\n") == 1
    assert "is missing" in done.stderr


def test_a_killed_export_leaves_nothing_and_the_next_carries_on(traced_before, exported, checkpoint, tmp_path):
    out = tmp_path / "out"
    code = f"import test_export; test_export.die_while_copying({str(exported)!r}, {str(checkpoint)!r}, {str(out)!r})"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    died = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [".partial"]
    assert [path.name for path in (out / ".partial").iterdir()] == ["model.safetensors"]
    export(checkpoint, out, weights="copy")
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.onnx", "model.safetensors"]


def die_while_copying(exported: str, checkpoint: str, out: str) -> None:
    convert = export_weights._converted

    def convert_and_die(checkpoint: object, name: str, dtype: str):
        yield from convert(checkpoint, name, dtype)
        os.kill(os.getpid(), signal.SIGKILL)

    export_weights._converted = convert_and_die
    stage.trace = lambda model, dtype: traced(Path(exported), dtype)
    export(Path(checkpoint), Path(out), weights="copy")


def test_up_to_date(traced_before, checkpoint, tmp_path, capsys):
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    model = export(other, tmp_path / "out")
    written = model.stat().st_mtime_ns
    export(other, tmp_path / "out")
    assert "up to date" in capsys.readouterr().out
    assert model.stat().st_mtime_ns == written
    export(other, tmp_path / "out", force=True)
    export(other, tmp_path / "out", weights="reference")  # another option
    os.utime(next(other.glob("*00001-of*")))  # another input
    export(other, tmp_path / "out", weights="reference")
    (tmp_path / "out" / "model.onnx").unlink()  # a result gone
    export(other, tmp_path / "out", weights="reference")
    assert "up to date" not in capsys.readouterr().out
