"""The single-operator table: does TensorRT's parser take it, and does what it made agree with onnxruntime?"""

import numpy as np
import onnx
import pytest
import torch
from network_cases import Case, cases
from network_rows import Agrees, Dies, Refused, Unknown

from suture.core.as_written import open_session
from suture.core.errors import UserError
from suture.core.network.evaluate import EvaluationError, Evaluator
from suture.core.network.parse import Refused as ParserRefused
from suture.core.network.parse import describe, parse

CASES = list(cases())
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest value
LENGTHS = {"N": 3, "B": 2, "S": 3, "L": 7, "P": 9, "M": 4, "H": 5, "W": 3}


def test_the_table_is_large_enough():
    assert len(CASES) >= 80
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator(case: Case, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(case.model, path)
    if isinstance(case.expected, Dies):  # in a child process, or the tests die with it
        with pytest.raises(UserError, match=f"died of {case.expected.signal}"):
            parse(path)
        return
    if isinstance(case.expected, Refused):
        with pytest.raises(ParserRefused, match=case.expected.why):
            describe(path.read_bytes(), path, tmp_path)
        return
    network = describe(path.read_bytes(), path, tmp_path)
    if isinstance(case.expected, Unknown):
        with pytest.raises(EvaluationError, match=case.expected.layers):
            Evaluator(network, "cpu")
        return
    feeds = make_feeds(case)
    outputs = Evaluator(network, "cpu")(feeds)
    errors = differences(outputs, reference_outputs(case, feeds))
    assert (max(errors.values()) <= 1) == isinstance(case.expected, Agrees), errors


def differences(outputs: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Of each output, the largest difference as a share of what its dtype allows; infinite for another shape or NaN."""
    errors = {}
    for name, value in outputs.items():
        wanted = torch.from_numpy(np.asarray(expected[name]).astype(np.float64))
        if value.shape != wanted.shape:
            errors[name] = np.inf
            continue
        same = (value == wanted) | (value.isnan() & wanted.isnan())
        error = torch.where(same, 0.0, (value.double() - wanted).abs()).nan_to_num(np.inf)
        allowed = TOLERANCE.get(value.dtype, 0) * wanted.abs().max().clamp(min=1e-9) + 1e-30
        errors[name] = (error.max() / allowed).item()
    return errors


def make_feeds(case: Case) -> dict:
    rng = np.random.default_rng(7)
    feeds = {}
    for value in case.model.graph.input:
        tensor = value.type.tensor_type
        shape = [LENGTHS[dim.dim_param] if dim.dim_param else dim.dim_value for dim in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if value.name in case.feeds:
            array = case.feeds[value.name]
        elif dtype.kind == "b":
            array = rng.random(shape) < 0.7
        elif value.name == "write_indices":
            array = np.array([2, 4])
        elif value.name == "lengths":
            array = np.array([4, 6])
        elif dtype.kind == "i":
            low, high = (1, 4) if value.name == "positive" else (0, 3) if value.name == "index" else (-3, 4)
            array = rng.integers(max(low, 0) if "position" in value.name else low, high, shape)
        else:
            array = rng.standard_normal(shape)
            array = np.abs(array) + 0.1 if value.name == "positive" else array
        feeds[value.name] = np.asarray(array).astype(dtype)
    return feeds


def reference_outputs(case: Case, feeds: dict) -> dict[str, np.ndarray]:
    session = open_session(case.reference, ".", case.name)
    wide = {name: value.astype(np.float32) if value.dtype.name == "bfloat16" else value for name, value in feeds.items()}
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, wide)))
