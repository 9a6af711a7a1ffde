"""build of graphs that are not decoders: ranges of their shapes, what --shape gives, jumps, and trtexec.txt."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from suture.build import trtexec
from suture.build.advice import advised
from suture.build.kernels import read_kernels
from suture.build.options import BuildOptions
from suture.build.profiles import make_profiles, name_apart
from suture.build.stage import build
from suture.core.errors import UserError
from suture.core.findings import Finding
from suture.core.network.advice import LOWER, LOWERED, lowering_advice
from suture.core.shapes import parse_shapes

LIMITS = {"split": True, "batch": 4, "prompt": None, "past": 64}
HEADER = '<ir_version: 10, opset_import: ["": 18]>'
ENCODER = f"""{HEADER} e (int64[batch, seq] input_ids, int64[batch, seq] attention_mask) => (float[batch, seq, 8] y)
<float[16, 8] table> {{ e = Gather(table, input_ids)  m = Cast<to = 1>(attention_mask)  a = Constant<value_ints = [2]>()
u = Unsqueeze(m, a)  y = Mul(e, u) }}"""
PICTURE = f"""{HEADER} p (float[batch, 3, h, w] x) => (float[batch, 3, oh, ow] y)
<float[3, 3, 3, 3] k, float[4] s = {{1, 1, 2, 2}}> {{
a = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, k)  b = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(a, k)
y = Resize<mode = "nearest">(b, , s) }}"""
JUMP = f"""{HEADER} j (bool[1] c, float[4, 4] x) => (float[4, 4] y) {{
y = If<then_branch = t () => (float[4, 4] p) {{ p = MatMul(x, x) }}, else_branch = f () => (float[4, 4] q) {{ q = Exp(x) }}>(c) }}"""


def parsed(text: str) -> onnx.ModelProto:
    """The graph, what it declares in angle brackets without values as weights."""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        model.graph.initializer.append(onnx.numpy_helper.from_array(random.standard_normal(shape, np.float32), value.name))
    del model.graph.value_info[:]
    return model


def profile(text: str, *shapes: str) -> dict:
    (found,) = make_profiles(parsed(text), None, **LIMITS, shapes=parse_shapes(shapes))
    return found.shapes


def test_ranges_of_an_encoder():
    assert profile(ENCODER) == dict.fromkeys(("input_ids", "attention_mask"), ((1, 1), (1, 128), (4, 512)))


STACKED = f"""{HEADER} s (int64[batch, seq] input_ids, int64[batch, seq] attention_mask, float[2, batch, 2, seq, 4] past_0)
=> (float[batch, total, 2] y) <int64 one = {{1}}, int64[1] last = {{2}}> {{
k = Gather(past_0, one)  m = Cast<to = 1>(attention_mask)  x = Unsqueeze(m, last)  y = Mul(x, x) }}"""


def test_a_stacked_cache_grows_and_the_mask_has_a_column_for_each_slot_and_token():
    found = profile(STACKED)
    assert found["input_ids"] == ((1, 1), (1, 128), (4, 512))
    assert found["past_0"] == ((2, 1, 2, 0, 4), (2, 1, 2, 128, 4), (2, 4, 2, 512, 4))
    assert found["attention_mask"] == ((1, 1), (1, 256), (4, 1024))


TABLE = f"""{HEADER} t (int64[batch, seq] input_ids) => (float[batch, seq, 8] y) <float[16, 8] words, float[20, 8] positions,
int64[1] first = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}> {{
e = Gather(words, input_ids)  n = Shape(input_ids)  s = Slice(n, one, two)  p = Slice(positions, first, s, first)  y = Add(e, p) }}"""


def test_usual_shapes_that_the_graph_does_not_take_are_halved_until_it_does(tmp_path, capsys):
    onnx.save(parsed(TABLE), tmp_path / "model.onnx")
    build(tmp_path / "model.onnx", tmp_path / "build", BuildOptions(compute_capability=("8.9",)))
    (made,) = json.loads((tmp_path / "build" / "engine.json").read_text())["profiles"]
    assert made["shapes"]["input_ids"] == [[1, 1], [1, 16], [4, 16]]
    assert "the graph takes none of the usual ones: for the shapes input_ids=1x1,1x16,4x16" in capsys.readouterr().out
    with pytest.raises(UserError, match="violate shape constraints"):
        build(
            tmp_path / "model.onnx",
            tmp_path / "given",
            BuildOptions(compute_capability=("8.9",), shape=("input_ids=1x1,1x128,4x512",)),
        )


def test_an_input_that_nothing_uses_is_kept_where_there_is_no_cache(tmp_path, capsys):
    model = onnx.parser.parse_model(f"{HEADER} u (float[2, 2] x, int32[3] unused) => (float[2, 2] y) {{ y = Exp(x) }}")
    onnx.save(model, tmp_path / "model.onnx")
    build(tmp_path / "model.onnx", tmp_path / "build", BuildOptions(compute_capability=("8.9",)))
    made = json.loads((tmp_path / "build" / "engine.json").read_text())
    assert [each["name"] for each in made["inputs"]] == ["x", "unused"]
    assert "warning: input unused: nothing in the graph uses it" in capsys.readouterr().out


def test_a_picture_is_what_the_graph_divides_it_by():
    assert profile(PICTURE) == {"x": ((1, 3, 4, 4), (1, 3, 64, 64), (4, 3, 128, 128))}


def test_a_given_range_holds_for_dimensions_of_the_same_name():
    given = ((2, 3), (2, 4), (5, 6))
    assert profile(ENCODER, "input_ids=2x3,2x4,5x6") == dict.fromkeys(("input_ids", "attention_mask"), given)


def test_two_ranges_of_one_name(tmp_path):
    with pytest.raises(UserError, match=r"attention_mask: its dimension 1 \(seq\) is 4 to 4, and that of input_ids is 3 to 3"):
        profile(ENCODER, "input_ids=2x3", "attention_mask=2x4")


def test_shapes_from_a_file(tmp_path):
    file = tmp_path / "shapes.txt"
    file.write_text("input_ids=1x2\n\nattention_mask=1x2\n")
    assert parse_shapes([f"@{file}"]) == parse_shapes(["input_ids=1x2", "attention_mask=1x2"])


def test_fixed_shapes_need_no_profile():
    assert make_profiles(parsed(JUMP), None, **LIMITS) == ()


def test_names_that_the_ranges_contradict_are_set_apart():
    model = parsed(ENCODER)
    profiles = make_profiles(model, None, **LIMITS)
    assert not name_apart(model, profiles)
    profiles[0].shapes["attention_mask"] = ((1, 2), (1, 129), (4, 513))
    assert name_apart(model, profiles)
    names = [[dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in model.graph.input]
    assert names == [["batch", "input_ids[1]"], ["batch", "attention_mask[1]"]]


def built(text: str, folder: Path, **options) -> Path:
    onnx.save(parsed(text), folder / "model.onnx")
    build(folder / "model.onnx", folder / "out", BuildOptions(compute_capability=("8.9",), **options))
    return folder / "out"


@pytest.mark.seconds
def test_an_encoder_is_built(tmp_path, capsys):
    out = built(ENCODER, tmp_path)
    assert "input_ids=1x1,1x128,4x512" in capsys.readouterr().out
    text = (out / "trtexec.txt").read_text()
    assert "trtexec \\\n    --onnx=../model.onnx \\\n    --saveEngine=model.engine \\\n    --stronglyTyped" in text
    assert "--maxShapes=input_ids:4x512,attention_mask:4x512" in text
    assert "--computeCapabilities=89" in text


def test_a_graph_with_jumps_is_built(tmp_path):
    out = built(JUMP, tmp_path)
    (kernels,) = json.loads((out / "kernels.json").read_text())["profiles"]
    assert kernels["kernels"] >= 2
    assert not {"jmp", "cjmp"} & set(kernels["by_type"])


def test_jumps_in_the_list_of_kernels():
    lines = "Layers:\nName: c_myl0_1, LayerType: cjmp, Inputs: [], Outputs: [], StreamId: 0, JumpTargetThen: a, JumpTargetElse: b, Metadata: \nName: g_myl0_2, LayerType: gemm, Inputs: [], Outputs: [], StreamId: 2, Metadata: \nName: j_myl0_3, LayerType: jmp, Inputs: [], Outputs: [], StreamId: 0, JumpTarget: b, Metadata: "  # fmt: skip # noqa: E501
    (listed,) = read_kernels([lines], ["any"])
    assert (listed["kernels"], listed["jumps"], [entry["stream"] for entry in listed["entries"]]) == (1, 2, [0, 2, 0])


def test_a_library_that_offers_no_plugin(tmp_path):
    library = tmp_path / "plugin.so"
    library.write_bytes(b"no library")
    with pytest.raises(UserError, match=r"plugin\.so: cannot be loaded"):
        built(JUMP, tmp_path, plugin=(library,))


def test_commands_of_two_profiles_and_weights_elsewhere():
    proto = parsed(ENCODER)
    (one,) = make_profiles(proto, None, **LIMITS)
    text = trtexec.commands(
        Path("/a/m.trt.onnx"), Path("/w"), Path("/o"), "model.engine", [one, one], ["8.9", "12.0"], external=True,
        plugins=[Path("/p/lib.so")],
    )  # fmt: skip
    assert "cp ../a/m.trt.onnx ../w/m.trt.onnx" in text
    assert text.count("--profile=1") == text.count("--computeCapabilities=89,120") * 2 == 2
    assert "--dynamicPlugins=../p/lib.so" in text


def test_no_advice_to_lower_what_surgery_lowered():
    proto = parsed(ENCODER)
    assert lowering_advice(proto) == LOWER
    proto.producer_name = "suture.surgery"
    assert lowering_advice(proto) == LOWERED
    assert advised([Finding("error", "x", "y", LOWER), Finding("note", "x", "y", "z")], proto)[1].remedy == "z"
