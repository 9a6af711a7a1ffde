"""A fixed sample of ONNX's node tests through TensorRT's parser and the evaluator; all of them: python -m benchmarks.node_tests."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import node_tests
from benchmarks.node_tests import AGREES, CONSTANT, DIFFERS, NOT_EVALUATED, REFUSED, NodeTestResult
from suture.core.network import windows
from suture.core.network.evaluate import LAYERS

MODULES = (
    "attention", "batch_normalization", "bernoulli", "bitwisexor", "cast", "conv", "convtranspose", "cumsum", "depthtospace", "einsum",
    "expand", "gather", "gathernd", "gemm", "globalaveragepool", "gridsample", "groupnormalization", "gru", "if_",
    "layernormalization", "loop", "lrn", "lstm", "matmul", "nonmaxsuppression", "nonzero", "onehot", "pad", "prelu",
    "quantizelinear", "rangeop", "reducemax", "reducesum", "resize", "reversesequence", "rmsnormalization", "rnn",
    "rotaryembedding", "scan", "scatterelements", "slice", "softmax", "spacetodepth", "split", "squeeze",
    "tensorscatter", "topk", "trilu", "unsqueeze",
)  # fmt: skip
SAMPLE = {
    "attention_4d": AGREES,
    "attention_4d_gqa_causal": AGREES,
    "attention_4d_softcap": REFUSED,
    "attention_4d_causal_nonpad_batch_prefill": DIFFERS,
    "attention_local_window": DIFFERS,
    "batchnorm_example": AGREES,
    "bernoulli_double_expanded": NOT_EVALUATED,
    "bitwise_xor_i32_2d": REFUSED,
    "cast_FLOAT_to_FLOAT16": AGREES,
    "cast_FLOAT_to_INT4": AGREES,
    "cast_FLOAT16_to_FLOAT4E2M1": AGREES,
    "cast_no_saturate_FLOAT_to_FLOAT8E4M3FN": DIFFERS,
    "conv_with_autopad_same": AGREES,
    "conv_with_strides_and_asymmetric_padding": AGREES,
    "convtranspose_3d": AGREES,
    "convtranspose_autopad_same": AGREES,
    "convtranspose_output_shape": AGREES,
    "cumsum_2d_axis_1": AGREES,
    "depthtospace_crd_mode_example": AGREES,
    "einsum_batch_diagonal": AGREES,
    "expand_dim_changed": AGREES,
    "gather_negative_indices": AGREES,
    "gathernd_example_int32_batch_dim1": AGREES,
    "gemm_all_attributes": AGREES,
    "globalaveragepool": AGREES,
    "gridsample_bicubic": AGREES,
    "gridsample_volumetric_bilinear_align_corners_1": AGREES,
    "group_normalization_example": AGREES,
    "gru_seq_length": AGREES,
    "gru_batchwise": DIFFERS,
    "if": AGREES,
    "layer_normalization_2d_axis1": REFUSED,
    "loop11": AGREES,
    "lrn": AGREES,
    "lstm_with_peepholes": AGREES,
    "matmul_4d": AGREES,
    "nonmaxsuppression_center_point_box_format": AGREES,
    "nonmaxsuppression_two_batches": AGREES,
    "nonzero_example": REFUSED,
    "onehot_negative_indices": REFUSED,
    "reflect_pad": AGREES,
    "prelu_broadcast": AGREES,
    "quantizelinear_axis": DIFFERS,
    "range_int32_type_negative_delta": AGREES,
    "reduce_max_empty_set": CONSTANT,
    "reduce_sum_keepdims_random": CONSTANT,
    "resize_downsample_scales_cubic": CONSTANT,
    "resize_upsample_sizes_nearest_ceil_half_pixel": AGREES,
    "resize_upsample_scales_linear_align_corners": CONSTANT,
    "reversesequence_time": AGREES,
    "rms_normalization_3d_axis1_epsilon": AGREES,
    "simple_rnn_with_initial_bias": AGREES,
    "rotary_embedding_interleaved": AGREES,
    "scan9_sum": AGREES,
    "scatter_elements_with_negative_indices": AGREES,
    "slice_negative_axes": AGREES,
    "softmax_large_number": AGREES,
    "spacetodepth_crd_mode_example": DIFFERS,
    "split_variable_parts_2d_opset18": AGREES,
    "squeeze_negative_axes": CONSTANT,
    "tensorscatter": AGREES,
    "top_k_smallest": AGREES,
    "triu": DIFFERS,
    "tril_neg": AGREES,
    "unsqueeze_two_axes": CONSTANT,
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cases():
    names = {f"test_{name}" for name in SAMPLE}
    return [case for case in node_tests.node_tests(MODULES) if case.name in names]


@pytest.mark.seconds
def test_sample(cases):
    results = list(node_tests.run_cases(cases))
    found = {result.case.removeprefix("test_"): result.result for result in results}
    assert found == SAMPLE
    assert all(node_tests.known(result) for result in results if result.result == DIFFERS)


def test_a_fault_of_the_evaluator_is_seen(cases, monkeypatch):
    """Padding in front alone: the case with padding on both sides must differ."""
    case = [each for each in cases if each.name == "test_conv_with_strides_and_asymmetric_padding"]
    monkeypatch.setattr(windows, "_flat", lambda sides: [size for pair in sides for size in pair])
    assert LAYERS["CONVOLUTION"] is windows.convolution
    (result,) = node_tests.run_cases(case)
    assert result.result in (DIFFERS, node_tests.FAILED)
    assert node_tests.known(result) is None


def test_difference_sees_shape_values_and_infinity():
    expected = np.ones((2, 3), np.float32)
    assert node_tests.difference(expected, expected + 1e-8, 1e-3, 1e-7) is None
    assert "differs by" in node_tests.difference(expected, expected + 0.1, 1e-3, 1e-7)
    assert "shape" in node_tests.difference(expected, expected[:1], 1e-3, 1e-7)
    assert "finite" in node_tests.difference(expected, expected * np.nan, 1e-3, 1e-7)


def test_table():
    results = [NodeTestResult("test_triu", "Trilu", DIFFERS, "y differs"), NodeTestResult("test_new", "New", DIFFERS, "z differs by 3"),
               NodeTestResult("test_tril", "Trilu", AGREES), NodeTestResult("test_xor", "BitwiseXor", REFUSED, "no | such")]  # fmt: skip
    page = node_tests.table(results, "tensorrt 1")
    assert "| Trilu | 1: triu | without `upper`" in page
    assert "| New | 1: new | open: z differs by 3 |" in page
    assert "no \\| such" in page


def test_the_page_in_docs_has_no_error_and_nothing_open():
    page = (Path(__file__).parents[1] / "docs" / "node_tests.md").read_text()
    assert ", 0 error" in page
    assert "| open:" not in page
    assert Counter(page.split())["Trilu"] >= 2
