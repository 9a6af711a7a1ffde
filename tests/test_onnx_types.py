"""What is refused for its types: what onnxruntime refuses for them, and nothing that it takes."""

import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoder_graphs import decoder_graph
from graphs import weightless
from onnx import TensorProto, helper, numpy_helper

from suture.core.errors import UserError
from suture.core.onnx_checks import check_model
from tests.abuse.graphs import small

TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8,
         TensorProto.BOOL, TensorProto.STRING, TensorProto.FLOAT8E4M3FN)  # fmt: skip
SIMPLE = ort.SessionOptions()
SIMPLE.graph_optimization_level, SIMPLE.log_severity_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, 4


def refused(model: onnx.ModelProto) -> str | None:
    """What is said of the model here, where it is refused."""
    try:
        check_model(model, "model.onnx")
    except UserError as error:
        return str(error)
    return None


def refused_there(model: onnx.ModelProto) -> str | None:
    """By onnxruntime; a type that it takes and has no kernel for is none."""
    try:
        ort.InferenceSession(model.SerializeToString(), SIMPLE, providers=["CPUExecutionProvider"])
    except Exception as error:
        return None if "NOT_IMPLEMENTED" in str(error) else str(error)
    return None


def every_graph(graph: onnx.GraphProto):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from every_graph(attribute.g)


def mutants(model: onnx.ModelProto):
    """Each input, output and weight in turn as each other type."""
    for number, graph in enumerate(every_graph(model.graph)):
        for kind in ("input", "output", "initializer"):
            for place, value in enumerate(getattr(graph, kind)):
                for dtype in TYPES:
                    mutant = onnx.ModelProto()
                    mutant.CopyFrom(model)
                    changed = getattr(list(every_graph(mutant.graph))[number], kind)[place]
                    if kind == "initializer":
                        dims = list(changed.dims)
                        changed.Clear()
                        values = [0] * onnx.numpy_helper.to_array(value).size
                        changed.CopyFrom(
                            helper.make_tensor(
                                value.name, dtype, dims, [b""] * len(values) if dtype == TensorProto.STRING else values
                            )
                        )
                    else:
                        changed.type.tensor_type.elem_type = dtype
                    yield f"{kind} {value.name} as {TensorProto.DataType.Name(dtype)}", mutant


@pytest.mark.parametrize(
    "model", [small(), decoder_graph(static=False), decoder_graph(static=True)], ids=["small", "growing", "static"]
)
@pytest.mark.sample("small", "static")
def test_types_are_refused_as_onnxruntime_refuses_them(model):
    wrong, count = [], 0
    for what, mutant in mutants(model):
        ours, theirs = refused(mutant), refused_there(mutant)
        count += ours is not None
        if (ours is None) != (theirs is None):
            wrong.append(f"{what}: {ours or theirs}")
    assert not wrong
    assert count > 20


def node_tests() -> list:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(action="ignore"):
        return [case for case in collect_testcases(None) if case.model is not None]


@pytest.mark.slow
def test_no_node_test_is_refused():
    found = {case.name: said for case in node_tests() if (said := refused(case.model))}
    assert not found


def model_of(node: onnx.NodeProto, inputs: dict[str, int], outputs: dict[str, int], opset: int = 24) -> onnx.ModelProto:
    values = [
        [helper.make_tensor_value_info(name, dtype, ["n", 4]) for name, dtype in each.items()] for each in (inputs, outputs)
    ]
    return helper.make_model(
        helper.make_graph([node], "g", *values), opset_imports=[helper.make_opsetid("", opset)], ir_version=10
    )


BF16, F8, F16, F32 = TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT16, TensorProto.FLOAT
ADD, SIN = helper.make_node("Add", ["a", "b"], ["y"]), helper.make_node("Sin", ["a"], ["y"])
NORM = helper.make_node("RMSNormalization", ["a", "b"], ["y"])
JOIN = helper.make_node("Concat", ["a", "b"], ["y"], axis=1)


@pytest.mark.parametrize(
    ("model", "takes"),
    [
        (model_of(SIN, {"a": BF16}, {"y": BF16}, 18), True),  # Sin has bfloat16 from opset 22 on
        (model_of(ADD, {"a": BF16, "b": F32}, {"y": BF16}), False),  # two types all the same
        (model_of(SIN, {"a": BF16}, {"y": F32}, 18), False),
        (model_of(NORM, {"a": F16, "b": F32}, {"y": F32}), True),  # its output has the scale's type
        (model_of(NORM, {"a": F16, "b": F32}, {"y": F16}), False),
        (model_of(JOIN, {"a": F8, "b": F8}, {"y": F8}), False),
    ],
)
def test_types_that_came_after_an_operator(model, takes):
    assert (refused(model) is None) == takes


def test_float8_is_taken_where_tensorrt_takes_it():
    model = model_of(JOIN, {"a": F8, "b": F8}, {"y": F8})
    model.graph.node.append(helper.make_node("TRT_Other", ["a"], ["z"]))
    assert refused(model) is None


@pytest.mark.parametrize("name", ["llama-torchscript-17-float32", "llama-dynamo-24-float16"])
def test_shapes_are_known_to_a_models_end(name):
    """Its last product with a weight whose rows are one too many."""
    model = weightless.load(name)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    last = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights][-1]
    tensor = weights[last.input[1]]
    tensor.CopyFrom(
        numpy_helper.from_array(
            np.zeros_like(numpy_helper.to_array(tensor), shape=[size + 1 for size in tensor.dims]), tensor.name
        )
    )
    assert "ncompatible" in refused(model)


def test_each_node_is_looked_at_once_a_function_and_types(monkeypatch):
    """Functions that call others many times cost no more than what they hold."""
    import suture.core.onnx_types as types

    looked, outputs = [], types._outputs
    monkeypatch.setattr(types, "_outputs", lambda node, *rest: looked.append(node.op_type) or outputs(node, *rest))
    model = small()
    for i in range(10):
        called = [
            helper.make_node(f"F{i + 1}" if i < 9 else "Relu", [a], [b], domain="own" if i < 9 else "") for a, b in ("ac", "cb")
        ]
        model.functions.append(
            helper.make_function(
                "own", f"F{i}", ["a"], ["b"], called, [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
            )
        )
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node[1].CopyFrom(helper.make_node("F0", ["m"], ["r"], domain="own"))
    assert refused(model) is None
    assert len(looked) < 40
