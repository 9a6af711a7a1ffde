"""Graphs that are changed at random, each change one that onnx's own structure allows."""

import random

import onnx
from onnx import AttributeProto

OPERATORS = ("Relu", "Add", "MatMul", "Concat", "Reshape", "Transpose", "Gather", "Cast", "Shape", "Slice", "Softmax", "Identity",
             "Split", "Where", "Range", "Attention", "RotaryEmbedding", "Nothing")  # fmt: skip
NUMBERS = (-(2**31), -7, -1, 0, 1, 2, 3, 9, 77, 2**31)


def mutated(model: onnx.ModelProto, draw: random.Random) -> onnx.ModelProto:
    """A copy with one to three changes."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    for _ in range(draw.choice((1, 1, 2, 3))):
        draw.choice(CHANGES)(found, draw)
    return found


def _node(model: onnx.ModelProto, draw: random.Random) -> onnx.NodeProto:
    return draw.choice(model.graph.node)


def _names(model: onnx.ModelProto) -> list[str]:
    graph = model.graph
    made = [name for node in graph.node for name in node.output]
    return [*made, *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer), "", "nowhere"]


def operator(model: onnx.ModelProto, draw: random.Random) -> None:
    _node(model, draw).op_type = draw.choice(OPERATORS)


def read(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(_names(model))


def reads_more(model: onnx.ModelProto, draw: random.Random) -> None:
    _node(model, draw).input.append(draw.choice(_names(model)))


def reads_less(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    del node.input[draw.randrange(len(node.input) + 1) :]


def written(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    node.output[draw.randrange(len(node.output))] = draw.choice(_names(model))


def domain(model: onnx.ModelProto, draw: random.Random) -> None:
    _node(model, draw).domain = draw.choice(("", "ai.onnx", "com.microsoft", "trt", "nobodys"))


def attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    with_some = [node for node in model.graph.node if node.attribute]
    if not with_some:
        return
    given = draw.choice(draw.choice(with_some).attribute)
    match draw.randrange(4):
        case 0:
            given.type = draw.choice((AttributeProto.INT, AttributeProto.INTS, AttributeProto.STRING, AttributeProto.FLOAT))
        case 1:
            given.name = draw.choice(("axis", "perm", "to", "other"))
        case 2:
            given.i = draw.choice(NUMBERS)
        case 3:
            given.ints.append(draw.choice(NUMBERS))


def weight(model: onnx.ModelProto, draw: random.Random) -> None:
    if not model.graph.initializer:
        return
    tensor = draw.choice(model.graph.initializer)
    match draw.randrange(4):
        case 0:
            tensor.data_type = draw.choice((0, 1, 6, 7, 9, 10, 16, 17, 77))
        case 1:
            tensor.dims.append(draw.choice(NUMBERS))
        case 2 if tensor.dims:
            tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(NUMBERS)
        case _ if tensor.raw_data:
            tensor.raw_data = tensor.raw_data[: -draw.choice((1, 4, 8))]


def value(model: onnx.ModelProto, draw: random.Random) -> None:
    kind = draw.choice([*model.graph.input, *model.graph.output]).type.tensor_type
    match draw.randrange(3):
        case 0:
            kind.elem_type = draw.choice((0, 1, 6, 7, 9, 10, 16, 77))
        case 1:
            kind.shape.dim.add(dim_value=draw.choice(NUMBERS))
        case 2 if kind.shape.dim:
            draw.choice(kind.shape.dim).dim_value = draw.choice(NUMBERS)


def called(model: onnx.ModelProto, draw: random.Random) -> None:
    draw.choice([*model.graph.input, *model.graph.output]).name = draw.choice(_names(model))


def order(model: onnx.ModelProto, draw: random.Random) -> None:
    nodes = list(model.graph.node)
    nodes.insert(draw.randrange(len(nodes)), nodes.pop(draw.randrange(len(nodes))))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def repeated(model: onnx.ModelProto, draw: random.Random) -> None:
    model.graph.node.add().CopyFrom(_node(model, draw))


def dropped(model: onnx.ModelProto, draw: random.Random) -> None:
    if len(model.graph.node) > 1:
        del model.graph.node[draw.randrange(len(model.graph.node))]


def version(model: onnx.ModelProto, draw: random.Random) -> None:
    draw.choice(model.opset_import).version = draw.choice((0, 1, 7, 13, 17, 18, 21, 23, 24, 99))


CHANGES = (operator, read, read, reads_more, reads_less, written, domain, attribute, attribute, weight, value, called, order, repeated,
           dropped, version)  # fmt: skip
