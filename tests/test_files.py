"""What a model may read: every tensor that names a file, wherever it stands in the model, and every place it may name."""

import hashlib
import json
import os
import struct
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoder_graphs import decoder_graph
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from suture.core.errors import UserError
from suture.core.reader import read_bytes, read_json
from suture.core.tensors import every_tensor, references
from suture.core.weights import load_graph, weight_files, weights_root
from suture.surgery.__main__ import main
from tests.decoding import decode, largest_error

LENGTH = 16  # bytes of the tensors below: float32 [4]


def outside(location: str, offset: object = 0, length: object = LENGTH) -> TensorProto:
    """A tensor float32 [4] in another file; an offset or length of None is left out."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph(nodes: list[onnx.NodeProto], **more) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    return helper.make_graph(nodes, "g", values[:1], values[1:], **more)


def model(nodes: list[onnx.NodeProto], functions=(), **more) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("own", 1)]
    made = graph(nodes, **more)
    made.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    return helper.make_model(made, opset_imports=opsets, functions=functions, ir_version=11)


def sparse(tensor: TensorProto) -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(tensor, numpy_helper.from_array(np.arange(4), "indices"), [4])


ADD, CONSTANT = helper.make_node("Add", ["x", "w"], ["y"]), "Constant"


def constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node(CONSTANT, [], ["w"], value=tensor)


def branch(tensor: TensorProto, deep: int) -> onnx.GraphProto:
    nodes = [constant(tensor)] if deep == 0 else [choice(tensor, deep - 1)]
    return helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])])


ZEROS = numpy_helper.from_array(np.zeros(4, np.float32), "w")


def branch_over(tensor: TensorProto) -> onnx.GraphProto:
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])]
    return helper.make_graph([ADD], "branch", [], outputs, initializer=[tensor])


def choice(tensor: TensorProto, deep: int = 0) -> onnx.NodeProto:
    other = numpy_helper.from_array(np.zeros(4, np.float32), "zeros")
    return helper.make_node("If", ["c"], ["w"], then_branch=branch(other, 0), else_branch=branch(tensor, deep))


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    function = helper.make_function("own", "Plus", ["x"], ["y"], [constant(tensor), ADD], [helper.make_opsetid("", 24)])
    return model([helper.make_node("Plus", ["x"], ["y"], domain="own")], [function])


def as_default(tensor: TensorProto) -> onnx.ModelProto:
    """The default of a function's attribute."""
    made = in_function(numpy_helper.from_array(np.zeros(4, np.float32), "w"))
    made.functions[0].attribute_proto.append(helper.make_attribute("value", tensor))
    return made


def in_training(tensor: TensorProto) -> onnx.ModelProto:
    made = model([helper.make_node("Relu", ["x"], ["y"])])
    made.training_info.add().algorithm.CopyFrom(graph([ADD], initializer=[tensor]))
    return made


def in_list(tensor: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Own", ["x"], ["y"], domain="own")
    node.attribute.append(AttributeProto(name="tables", type=AttributeProto.TENSORS, tensors=[tensor]))
    return model([node])


PLACES = {
    "initializer": lambda tensor: model([ADD], initializer=[tensor]),
    "sparse initializer": lambda tensor: model([ADD], sparse_initializer=[sparse(tensor)]),
    "constant": lambda tensor: model([constant(tensor), ADD]),
    "sparse constant": lambda tensor: model([helper.make_node(CONSTANT, [], ["w"], sparse_value=sparse(tensor)), ADD]),
    "list of tensors": in_list,
    "branch": lambda tensor: model([choice(tensor), ADD]),
    "branch of a branch": lambda tensor: model([choice(tensor, deep=1), ADD]),
    "initializer of a branch": lambda tensor: model(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch_over(tensor), else_branch=branch_over(ZEROS))]
    ),
    "function": in_function,
    "attribute's default": as_default,
    "training": in_training,
}
REFUSED = {
    "above": (("../secret",), "lie outside"),
    "above, by a detour": (("below/../../secret",), "lie outside"),
    "absolute": (("/etc/passwd",), "lie outside"),
    "a link out": (("link",), "lie outside"),
    "a link to a device": (("device",), "lie outside"),
    "a FIFO": (("fifo",), "is not a regular file"),
    "a folder": (("below",), "is a folder"),
    "the folder itself": ((".",), "is a folder"),
    "nothing": (("",), "lie outside"),
    "a NUL": (("w\0",), "lie outside"),
    "a name too long": (("w" * 5000,), "cannot be read"),
    "links in a circle": (("circle",), "cannot be read"),
    "missing": (("absent",), "no such file"),
    "before the file": (("weights", -16), "is not a size"),
    "behind the file": (("weights", 64), "truncated: 64 bytes, but w ends at 80"),
    "beyond 64 bits": (("weights", 10**30), "is not a size"),
    "no number": (("weights", "1e1"), "is not a size"),
    "too few bytes": (("weights", 0, 12), "refers to 12 bytes, and its shape and type need 16"),
    "too many bytes": (("weights", 0, 64), "refers to 64 bytes"),
    "a negative length": (("weights", 0, -16), "is not a size"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's folder with a file of weights, and what may lie in such a file's place."""
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(64))
    (folder / "weights").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    (folder / "link").symlink_to("../secret")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "fifo")
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_each_place_that_a_tensor_can_stand_in(place, folder):
    for location, offset, length in (("weights", 16, LENGTH), ("weights", 48, None), ("link", 0, LENGTH)):
        made = PLACES[place](outside(location, offset, length))
        assert len(list(references(made))) == 1
        onnx.save(made, folder / "model.onnx")
        if location == "weights":
            assert weight_files(load_graph(folder / "model.onnx"), folder) == [folder / "weights"]
        else:
            with pytest.raises(UserError, match="lie outside"):
                load_graph(folder / "model.onnx")


@pytest.mark.parametrize("kind", REFUSED)
def test_each_place_that_a_tensor_must_not_name(kind, folder):
    arguments, said = REFUSED[kind]
    onnx.save(PLACES["constant"](outside(*arguments)), folder / "model.onnx")
    with pytest.raises(UserError, match=said):
        load_graph(folder / "model.onnx")


def test_a_place_that_is_said_twice_or_not_at_all(folder):
    twice, never = outside("weights"), outside("weights")
    twice.external_data.add(key="location", value="../secret")
    del never.external_data[:]
    for tensor in (twice, never):
        onnx.save(PLACES["constant"](tensor), folder / "model.onnx")
        with pytest.raises(UserError, match="does not say once where its bytes are"):
            load_graph(folder / "model.onnx")


def test_types_and_sizes_that_cannot_lie_outside(folder):
    text, negative = outside("weights"), outside("weights")
    text.data_type, negative.dims[:] = TensorProto.STRING, [-4]
    for tensor, said in ((text, r"has a type|tensor\(string\)"), (negative, "has the shape")):
        onnx.save(PLACES["branch"](tensor), folder / "model.onnx")
        with pytest.raises(UserError, match=said):
            load_graph(folder / "model.onnx")


@pytest.mark.parametrize(
    ("content", "hashed", "said"),
    [
        ("safetensors", None, None),
        ("bytes", "their own", None),
        ("bytes", None, "lie outside"),
        ("bytes", "another's", "has changed since"),
        ("a header alone", None, "lie outside"),
    ],
)
def test_a_recorded_root_reaches_safetensors_and_files_whose_hash_is_recorded(content, hashed, said, tmp_path):
    """Anybody can write a manifest: that it names a folder does not make all that lies there weights."""
    elsewhere, folder = tmp_path / "checkpoint", tmp_path / "graph"
    elsewhere.mkdir()
    folder.mkdir()
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(64)
    before = b"" if content == "bytes" else struct.pack("<Q", len(header)) + header
    values = np.ones(4, np.float32).tobytes()
    (elsewhere / "w.data").write_bytes(before + values)
    place = outside("w.data", len(before) if content == "safetensors" else 0)
    onnx.save(PLACES["initializer"](place), folder / "model.onnx")
    manifest: dict = {"outputs": {"model.onnx": 0}, "weights_root": "../checkpoint"}
    if hashed:
        sha = hashlib.sha256(before + values if hashed == "their own" else b"").hexdigest()
        manifest["content"] = {"../checkpoint/w.data": {"sha256": sha}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=said) if said else nullcontext():
        load_graph(folder / "model.onnx")


def test_a_snapshot_of_the_hub_reads_its_own_blobs_alone(tmp_path):
    """snapshots/COMMIT/NAME is a link to blobs/SHA of the same models--OWNER--NAME, and to nobody else's."""
    for name in ("models--a--b", "models--a--c"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "0123").write_bytes(np.ones(4, np.float32).tobytes())
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "w.data").symlink_to("../../blobs/0123")
    (snapshot / "other").symlink_to("../../../models--a--c/blobs/0123")
    onnx.save(PLACES["initializer"](outside("w.data")), snapshot / "model.onnx")
    ((_, place),) = references(load_graph(snapshot / "model.onnx"))
    assert place["location"] == "blobs/0123"
    assert weights_root(snapshot / "model.onnx") == tmp_path / "models--a--b"
    onnx.save(PLACES["initializer"](outside("other")), snapshot / "model.onnx")
    with pytest.raises(UserError, match="lie outside"):
        load_graph(snapshot / "model.onnx")


def with_constant(location: str, tmp_path: Path) -> tuple[Path, onnx.ModelProto]:
    """A decoder in a folder of its own, one of its weights a Constant node's that lies at `location`."""
    decoder = decoder_graph(static=False)
    weight = max(decoder.graph.initializer, key=lambda each: len(each.raw_data))
    whole = onnx.ModelProto.FromString(decoder.SerializeToString())
    tensor = TensorProto(name=weight.name, data_type=weight.data_type, dims=weight.dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", 0), ("length", len(weight.raw_data))):
        tensor.external_data.add(key=key, value=str(value))
    source = tmp_path / "source"
    source.mkdir()
    (source / location).write_bytes(weight.raw_data)
    decoder.graph.initializer.remove(weight)
    decoder.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    onnx.save(decoder, source / "model.onnx")
    return source / "model.onnx", whole


@pytest.mark.parametrize("more", [[], ["--merge", "gate-up", "qkv"]], ids=["in place", "with weights that a pass adds"])
@pytest.mark.seconds
def test_surgery_keeps_a_weight_that_a_constant_has_in_a_file(more, tmp_path, monkeypatch):
    monkeypatch.setattr("suture.surgery.graph.weights.INLINE", 0)
    path, whole = with_constant("w.data", tmp_path)
    assert main([str(path), "--out", str(tmp_path / "out"), "--capacity", "32", "--verify", *more]) == 0
    portable = load_graph(tmp_path / "out" / "model.onnx")
    assert largest_error(decode(whole, alone=True), decode(portable, alone=False, root=tmp_path / "out")) < 1e-4


@pytest.mark.parametrize("location", ["../secret.txt", "absolute"])
@pytest.mark.parametrize("more", [[], ["--merge", "gate-up", "qkv"]], ids=["in place", "with weights that a pass adds"])
def test_surgery_reads_and_writes_nothing_outside(location, more, tmp_path, monkeypatch):
    monkeypatch.setattr("suture.surgery.graph.weights.INLINE", 0)
    secret = tmp_path / "secret.txt"
    path, _ = with_constant(str(secret) if location == "absolute" else location, tmp_path)
    content = secret.read_bytes()
    with pytest.raises(UserError, match="lie outside"):
        main([str(path), "--out", str(tmp_path / "out"), "--capacity", "32", *more])
    assert secret.read_bytes() == content
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_nodes", [False, True], ids=["initializers", "Constant nodes"])
@pytest.mark.sample(1)
@pytest.mark.seconds
def test_surgery_reads_small_tensors_that_lie_outside(as_nodes, tmp_path):
    """Shapes and axes among them, without whose values nothing can be inferred."""
    whole = decoder_graph(static=False)
    saved, source = onnx.ModelProto.FromString(whole.SerializeToString()), tmp_path / "source"
    if as_nodes:
        for tensor in saved.graph.initializer:
            saved.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        del saved.graph.initializer[:]
    source.mkdir()
    settings = {"location": "w.data", "size_threshold": 0, "convert_attribute": True}
    onnx.save(saved, source / "model.onnx", save_as_external_data=True, **settings)
    assert len(list(references(load_graph(source / "model.onnx")))) == len(whole.graph.initializer)
    assert main([str(source / "model.onnx"), "--out", str(tmp_path / "out"), "--capacity", "32", "--verify"]) == 0
    portable = load_graph(tmp_path / "out" / "model.onnx")
    assert largest_error(decode(whole, alone=True), decode(portable, alone=False, root=tmp_path / "out")) < 1e-4


def test_every_tensor_of_a_written_graph_is_seen():
    assert {tensor.name for tensor in every_tensor(decoder_graph(static=True))} >= {"cos", "sin"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1]", "is not a JSON object"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"{", "is not JSON"),
    ],
)
def test_json_that_is_no_object(content, said, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_json(tmp_path / "file.json")


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, said in (
        (tmp_path / "fifo", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(UserError, match=said):
            read_bytes(path)
    (tmp_path / "large").write_bytes(bytes(100))
    with pytest.raises(UserError, match="more than 99 bytes"):
        read_bytes(tmp_path / "large", limit=99)
