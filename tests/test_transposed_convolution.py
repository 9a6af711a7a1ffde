"""Transposed convolutions in bfloat16 as products: the same numbers, and what overlaps or is padded stays."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from suture.surgery.graph import files
from suture.surgery.passes.lowering import transposed_convolution

FORMS = {
    "2-D": (["b", 4, 3, 5], [4, 6, 2, 2], {"strides": [2, 2]}, True),
    "2-D, sides not known": (["b", 4, "h", "w"], [4, 6, 2, 2], {"strides": [2, 2]}, True),
    "1-D, no bias": (["b", 4, 7], [4, 3, 3], {"strides": [3]}, False),
    "3-D, kernel not square": ([1, 2, 2, 3, 2], [2, 3, 1, 2, 3], {"strides": [1, 2, 3]}, True),
}
OTHERS = {
    "overlap": ([4, 6, 4, 4], {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "gaps": ([4, 6, 1, 1], {"strides": [2, 2]}),
    "groups": ([4, 3, 2, 2], {"strides": [2, 2], "group": 2}),
    "output padding": ([4, 6, 2, 2], {"strides": [2, 2], "output_padding": [1, 1]}),
}


def made(shape: list, kernel: list[int], attributes: dict, bias: bool, dtype: int) -> onnx.ModelProto:
    random, kind = np.random.default_rng(0), helper.tensor_dtype_to_np_dtype(dtype)
    weights = {"w": random.standard_normal(kernel).astype(kind)}
    if bias:
        weights["c"] = random.standard_normal(kernel[1] * attributes.get("group", 1)).astype(kind)
    node = helper.make_node("ConvTranspose", ["x", *weights], ["y"], **attributes)
    values = [helper.make_tensor_value_info(name, dtype, sizes) for name, sizes in (("x", shape), ("y", [None] * len(shape)))]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph([node], "g", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def lowered(model: onnx.ModelProto, folder) -> tuple[int, onnx.ModelProto]:
    onnx.save(model, folder / "model.onnx")
    graph = files.read(folder / "model.onnx")
    matched = transposed_convolution.run(graph)
    graph.gs.cleanup().toposort()
    return matched, files.without_shapes(files.to_model(graph))


@pytest.mark.parametrize("form", FORMS)
def test_a_product_has_the_same_numbers(form, tmp_path, monkeypatch):
    """In float32, which onnxruntime computes: the pass itself takes bfloat16 alone."""
    model = made(*FORMS[form], TensorProto.FLOAT)
    assert lowered(model, tmp_path)[0] == 0
    monkeypatch.setattr(transposed_convolution, "TYPES", (TensorProto.FLOAT,))
    matched, product = lowered(model, tmp_path)
    found = Counter(node.op_type for node in product.graph.node)
    assert (matched, found["MatMul"], found["ConvTranspose"]) == (1, 1, 0)
    sizes = [{"b": 2, "h": 3, "w": 5}.get(size, size) for size in FORMS[form][0]]
    feeds = {"x": np.random.default_rng(1).standard_normal(sizes).astype(np.float32)}
    expected, got = (
        ort.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for each in (model, product)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_taken(tmp_path):
    assert lowered(made(*FORMS["2-D"], TensorProto.BFLOAT16), tmp_path)[0] == 1


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_no_product_stays(form, tmp_path):
    kernel, attributes = OTHERS[form]
    assert lowered(made(["b", 4, 3, 5], kernel, attributes, True, TensorProto.BFLOAT16), tmp_path)[0] == 0
