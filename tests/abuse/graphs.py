"""A small graph, and the ways to break it: what is done to it, and words of the line that it is refused with."""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def small() -> onnx.ModelProto:
    """y = relu(x · weight) and, where `flag` says so, its negative."""
    x, flag = (
        helper.make_tensor_value_info("x", FLOAT, ["batch", 4]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    )
    y = helper.make_tensor_value_info("y", FLOAT, ["batch", 4])
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["r"], [name])], name, [], [helper.make_empty_tensor_value_info(name)]
        )
        for name, op in (("then", "Neg"), ("else", "Identity"))
    }
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["m"], name="product"),
        helper.make_node("Relu", ["m"], ["r"], name="relu"),
        helper.make_node("If", ["flag"], ["y"], name="choice", **branches),
    ]
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
    graph = helper.make_graph(nodes, "small", [x, flag], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def change(path: str, value: object) -> Callable[[onnx.ModelProto], None]:
    """Sets a field, its path written as in Python: graph.node[0].op_type."""

    def apply(model: onnx.ModelProto) -> None:
        names = path.replace("[", ".").replace("]", "").split(".")
        found = model
        for name in names[:-1]:
            found = found[int(name)] if name.isdigit() else getattr(found, name)
        if names[-1].isdigit():
            found[int(names[-1])] = value
        else:
            setattr(found, names[-1], value)

    return apply


def add(path: str, value: object) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        found = model
        for name in path.replace("[", ".").replace("]", "").split("."):
            found = found[int(name)] if name.isdigit() else getattr(found, name)
        found.append(value)

    return apply


def no_imports(model: onnx.ModelProto) -> None:
    del model.opset_import[:]
    model.graph.node[1].op_type = "Softmax"  # which has changed: of a graph that leaves one meaning the import is certain


def nested(model: onnx.ModelProto) -> None:
    graph = leaf = model.graph.node[2].attribute[0].g
    for _ in range(25):
        node = helper.make_node("If", ["flag"], [graph.output[0].name], else_branch=leaf, then_branch=leaf)
        leaf = onnx.GraphProto.FromString(leaf.SerializeToString())
        del graph.node[:]
        graph.node.append(node)
        graph = graph.node[0].attribute[0].g


def calls_itself(model: onnx.ModelProto) -> None:
    node = helper.make_node("Own", ["a"], ["b"], domain="own")
    model.functions.append(helper.make_function("own", "Own", ["a"], ["b"], [node], [helper.make_opsetid("own", 1)]))
    model.opset_import.append(helper.make_opsetid("own", 1))


def billion_calls(model: onnx.ModelProto) -> None:
    """Functions that each call the next one twice."""
    for i in range(30):
        inner = helper.make_node("Relu", ["a"], ["b"]) if i == 29 else helper.make_node(f"F{i + 1}", ["a"], ["c"], domain="own")
        nodes = [inner] if i == 29 else [inner, helper.make_node(f"F{i + 1}", ["c"], ["b"], domain="own")]
        imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        model.functions.append(helper.make_function("own", f"F{i}", ["a"], ["b"], nodes, imports))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node[1].CopyFrom(helper.make_node("F0", ["m"], ["r"], domain="own"))


def other_branch_type(model: onnx.ModelProto) -> None:
    """One branch of the If gives int64."""
    branch = model.graph.node[2].attribute[0].g
    branch.node.append(helper.make_node("Cast", [branch.output[0].name], ["cast"], to=TensorProto.INT64))
    branch.output[0].name = "cast"


def weight_is_input(dtype: int, dims: list[int]) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.input.append(helper.make_tensor_value_info("weight", dtype, dims))


def instead(op: str, *inputs: str, **attributes: object) -> Callable[[onnx.ModelProto], None]:
    """Another node in the place of the Relu."""
    return lambda model: model.graph.node[1].CopyFrom(helper.make_node(op, inputs or ["m"], ["r"], **attributes))


def with_weight(values: np.ndarray, op: str, **attributes: object) -> Callable[[onnx.ModelProto], None]:
    """The same, over another weight as well."""

    def apply(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(values, "further"))
        instead(op, "m", "further", **attributes)(model)

    return apply


def no_else(model: onnx.ModelProto) -> None:
    del model.graph.node[2].attribute[1]


def attribute_twice(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute.append(model.graph.node[2].attribute[0])


FURTHER = {  # what shapes and attributes cannot be
    "no permutation": instead("Transpose", perm=[0, 0]),
    "permutation of other rank": instead("Transpose", perm=[0, 2, 1]),
    "cast to no type": instead("Cast", to=99),
    "constant without a value": instead("Constant"),
    "axis beyond": instead("Softmax", axis=9),
    "axis beyond, of Concat": instead("Concat", "m", "m", axis=-7),
    "two sizes unknown": with_weight(np.array([-1, -1]), "Reshape"),
    "axis that is not 1": with_weight(np.array([1]), "Squeeze"),
    "shape of floats": with_weight(np.array([1.0, 4.0], np.float32), "Reshape"),
    "parts of another sum": with_weight(np.array([1, 9]), "Split", axis=1),
    "repeats of another rank": with_weight(np.array([1, 2, 3]), "Tile"),
    "shapes that do not broadcast": with_weight(np.zeros(3, np.float32), "Add"),
    "product that does not fit": with_weight(np.zeros((5, 4), np.float32), "MatMul"),
    "no else": no_else,
    "attribute twice": attribute_twice,
    "an attribute of two types": change("graph.node[2].attribute[0].i", 3),
    "output of no type": change("graph.output[0].type.tensor_type.elem_type", 0),
    "a value's type twice": lambda model: model.graph.value_info.extend(
        helper.make_tensor_value_info("r", dtype, ["batch", 4]) for dtype in (FLOAT, TensorProto.INT64)
    ),
}


def contrib(op: str, *inputs: str, **attributes: object) -> Callable[[onnx.ModelProto], None]:
    """The same of an operator of onnxruntime's own, which onnx knows nothing of."""

    def apply(model: onnx.ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        instead(op, *inputs, domain="com.microsoft", **attributes)(model)

    return apply


NOT_LOADED = {  # what onnxruntime alone refuses, as it loads the graph
    "no such operator of onnxruntime's": contrib("Relu", "m"),
    "an attribute too many": contrib("Gelu", "m", slope=1.0),
    "an attribute too few": contrib("MatMulNBits", "m", "m", "m"),
    "an input too few": contrib("FusedMatMul", "m"),
    "an input too many": contrib("QuickGelu", "m", "m"),
    "a type that it does not take": contrib("FusedMatMul", "m", "flag"),
}


def made(text: str, untyped: str = "") -> Callable[[onnx.ModelProto], None]:
    """Another graph, one of whose outputs has no type."""

    def apply(model: onnx.ModelProto) -> None:
        model.CopyFrom(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 18, "own": 1]> g {text}'))
        for value in model.graph.output:
            if value.name == untyped:
                value.ClearField("type")

    return apply


def with_map(model: onnx.ModelProto) -> None:
    made("(float[n] x) => (float[n] z) { z = Neg(x) }")(model)
    given = model.graph.input.add(name="map").type.map_type
    given.key_type, given.value_type.tensor_type.elem_type = TensorProto.INT64, FLOAT


NO_FORM = {  # valid, and of types that surgery cannot write
    "an output of nobody's operator": made("(float[n] x) => (float z) { z = own.Op(x) }", "z"),
    "an output of TensorRT's operator": made("(float[n] x) => (float z) { z = TRT_Op(x) }", "z"),
    "an optional output": made("(float[n] x) => (optional(float[n]) z) { z = Optional(x) }"),
    "an optional output without type": made("(float[n] x) => (float z) { z = Optional(x) }", "z"),
    "an optional input": made("(optional(float[n]) x) => (float[n] z) { z = OptionalGetElement(x) }"),
    "a map": with_map,
}
BROKEN = {
    "no imports": (no_imports, "whose version its opset_import does not say"),
    "two versions": (add("opset_import", helper.make_opsetid("ai.onnx", 17)), "imports two versions"),
    "version 0": (change("opset_import[0].version", 0), "imports version 0"),
    "version 10**9": (change("opset_import[0].version", 10**9), "imports version 1000000000"),
    "unknown operator": (change("graph.node[1].op_type", "Rellu"), "No Op registered for Rellu"),
    "unknown domain": (change("graph.node[1].domain", "nobodys"), "operators of 'nobodys'"),
    "IR version": (change("ir_version", 99), "ir_version 99"),
    "input nobody makes": (change("graph.node[1].input[0]", "nowhere"), "reads 'nowhere', which nothing produces"),
    "branch reads nothing": (change("graph.node[2].attribute[0].g.node[0].input[0]", "nowhere"), "which nothing produces"),
    "two producers": (change("graph.node[1].output[0]", "m"), "writes 'm', which is there already"),
    "writes a weight": (change("graph.node[1].output[0]", "weight"), "writes 'weight'"),
    "cycle": (change("graph.node[0].input[0]", "r"), "the graph has a cycle"),
    "output nobody makes": (change("graph.output[0].name", "nowhere"), "output 'nowhere' is not an output of any node"),
    "input twice": (add("graph.input", helper.make_tensor_value_info("x", FLOAT, [1])), "single static assignment"),
    "no input": (change("graph.node[1].input[0]", ""), "empty string"),
    "too many inputs": (add("graph.node[1].input", "x"), "input size 2 not in range"),
    "unknown attribute": (add("graph.node[1].attribute", helper.make_attribute("slope", 1.0)), "Unrecognized attribute"),
    "attribute's type": (change("graph.node[2].attribute[0].type", AttributeProto.INT), "attribute"),
    "weight's type": (change("graph.initializer[0].data_type", 77), "has the type 77"),
    "weight's shape": (change("graph.initializer[0].dims[0]", 5), "holds 64 of the 80"),
    "negative size": (change("graph.initializer[0].dims[0]", -4), "has the shape [-4, 4]"),
    "overflowing shape": (change("graph.initializer[0].dims[0]", 2**62), "has the shape"),
    "short data": (change("graph.initializer[0].raw_data", b"\0" * 60), "holds 60 of the 64"),
    "input's type": (change("graph.input[0].type.tensor_type.elem_type", 77), "has the type 77"),
    "types that do not fit": (change("graph.input[0].type.tensor_type.elem_type", TensorProto.INT64), "type"),
    "absurd dimension": (change("graph.input[0].type.tensor_type.shape.dim[1].dim_value", 2**60), "has a dimension of"),
    "deep": (nested, "subgraphs more than 20 deep"),
    "a billion calls": (billion_calls, "with those of its functions"),
    "branches of two types": (other_branch_type, "gives 'y' the type"),
    "outputs of an If": (add("graph.node[2].output", "z"), "has 2 outputs, and its graph 1"),
    "shapes that do not fit": (change("graph.input[0].type.tensor_type.shape.dim[1].dim_value", 3), "Incompatible dimensions"),
    "output's type": (
        change("graph.output[0].type.tensor_type.elem_type", TensorProto.INT64),
        "gives 'y' the type tensor(float)",
    ),
    "inner type": (add("graph.value_info", helper.make_tensor_value_info("r", TensorProto.INT32, None)), "and the graph says"),
    "default of another type": (weight_is_input(TensorProto.INT64, [4, 4]), "has another type or shape"),
    "default of another shape": (weight_is_input(FLOAT, [4, 5]), "has another type or shape"),
    "function calls itself": (calls_itself, "call one another in a circle"),
    **{name: (damage, "") for name, damage in FURTHER.items()},
}
