"""Inputs and outputs keep what the source calls their axes, which proves no two of them equal while a graph is worked on."""

import onnx

from suture.surgery.graph.interface import restore, separate

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, N, 4] x, float[N, M] z) => (float[N, N, 4] y, float[K] w)
    <float[N, 4] inner> { y = Neg(x) w = ReduceSum(z) }"""


def dims(values) -> dict[str, list]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }  # fmt: skip


def test_every_axis_has_a_symbol_of_its_own_until_the_graph_is_written():
    model = onnx.parser.parse_model(TEXT)
    before = dims([*model.graph.input, *model.graph.output])
    interface = separate(model)
    assert dims(model.graph.input) == {"x": ["x.0", "x.1", 4], "z": ["z.0", "z.1"]}
    assert dims(model.graph.output) == {"y": [0, 0, 4], "w": [0]}
    restore(model, interface)
    assert dims([*model.graph.input, *model.graph.output]) == before


def test_an_axis_without_a_name_and_one_of_minus_one_stay_so():
    model = onnx.parser.parse_model(TEXT)
    first, second, _ = model.graph.input[0].type.tensor_type.shape.dim
    first.Clear()
    second.dim_value = -1
    interface = separate(model)
    assert dims(model.graph.input)["x"] == ["x.0", "x.1", 4]
    restore(model, interface)
    assert not any(dim.WhichOneof("value") for dim in model.graph.input[0].type.tensor_type.shape.dim[:2])


def test_outputs_whose_shape_may_change_and_weights_are_left_alone():
    model = onnx.parser.parse_model(TEXT)
    model.graph.initializer.add(name="z", dims=[2, 3], data_type=onnx.TensorProto.FLOAT, float_data=[0] * 6)
    interface = separate(model, ["y"])
    assert set(interface.outputs) == {"w"}
    assert dims(model.graph.input)["z"] == ["N", "M"]
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 8
    restore(model, interface)
    assert dims(model.graph.output)["y"][2] == 8
