"""What is refused where a graph is read: a table of broken graphs, each with the words of its one line, and all good ones pass."""

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from graphs import weightless

from suture.core.errors import UserError
from suture.core.onnx_checks import check_model, onnx_refusals
from tests.abuse.graphs import BROKEN, change, small


@pytest.mark.parametrize("name", BROKEN)
def test_broken_graphs_are_refused_in_one_line(name):
    model = small()
    check_model(model, "small.onnx")
    damage, says = BROKEN[name]
    damage(model)
    with pytest.raises(UserError) as error:
        check_model(model, "small.onnx")
    assert str(error.value).startswith("small.onnx: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_that_is_no_utf8_is_refused():
    content = small().SerializeToString().replace(b"weight", b"w\xff\xfeght")
    with pytest.raises(UserError, match="not UTF-8"):
        check_model(onnx.ModelProto.FromString(content), "small.onnx")


@pytest.mark.parametrize(
    "name", [*weightless.names(), *(f"genai/{path.name[:-8]}" for path in Path(weightless.FOLDER, "genai").glob("*.gz"))]
)
def test_good_graphs_pass(name):
    check_model(weightless.load(name), name)


@pytest.mark.parametrize(
    "change",
    [
        change("graph.name", ""),
        change("graph.input[0].type.tensor_type.shape.dim[0].dim_value", -1),
        change("ir_version", 3),
        lambda model: model.graph.node.append(model.graph.node.pop(0)),
        lambda model: model.graph.output[0].ClearField("type"),
    ],
    ids=["no name", "-1 for unknown", "old", "unsorted", "no output type"],
)
def test_what_onnxruntime_takes_is_not_refused(change):
    model = small()
    change(model)
    ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    check_model(model, "small.onnx")


def test_checking_leaves_the_model_as_it_was():
    model = small()
    before = model.SerializeToString(deterministic=True)
    check_model(model, "small.onnx")
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), RecursionError(), onnx.checker.ValidationError("bad")])
def test_what_libraries_raise_is_one_line(error):
    with pytest.raises(UserError, match=r"^graph.onnx: is no valid ONNX graph") as found, onnx_refusals("graph.onnx"):
        raise error
    assert "\n" not in str(found.value)
