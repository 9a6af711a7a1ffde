"""ONNX's own node tests of what passes rewrite, and the functions that define these operators, through surgery."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.draws.judge import AGREES, FAULTS, NETWORK_DIFFERS, judge
from benchmarks.node_tests import node_tests
from suture.core.network.parse import ParserProcess

NODES = {  # by their module in onnx.backend.test.case.node, how their names begin
    "attention": "attention.*(?<!_expanded)$",  # of which draws have enough written out
    "gelu": "gelu",
    "groupnormalization": "group_norm",
    "instance_normalization": "instancenorm",
    "rmsnormalization": "rms_norm",
    "rotaryembedding": "rotary_emb",
    "selu": "selu",
    "swish": "swish",
    "tensorscatter": "tensorscatter",
    "trilu": "tri[lu]",
}
# rows of a query that may attend to nothing: zeros in onnxruntime; in TensorRT the mean of all values
SEE_NOTHING = {
    "test_attention_causal_boolmask_nan_robustness",
    "test_attention_23_boolmask_fullymasked_row_nan_robustness",
    "test_attention_4d_causal_nonpad_negative_offset_structural_empty",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Given:
    """What `judge` asks of a draw, of a node test."""

    case: Any
    decoder: bool = False
    axes: str = "fixed"

    def model(self) -> onnx.ModelProto:
        model = onnx.ModelProto.FromString(self.case.model.SerializeToString())
        model.ir_version = 10
        return model

    def feeds(self) -> list[dict[str, np.ndarray]]:
        return [dict(zip([value.name for value in self.case.model.graph.input], self.case.data_sets[0][0]))]


@pytest.mark.parametrize("module", NODES)
@pytest.mark.seconds
def test_surgery_keeps_what_they_mean(module):
    cases = [case for case in node_tests([module], f"^test_{NODES[module]}") if _in_numpy(case)]
    with ParserProcess() as parser:
        found = {case.name: judge(Given(case), parser) for case in cases}
    assert AGREES in {verdict.result for verdict in found.values()}
    faults = {name: verdict for name, verdict in found.items() if verdict.result in FAULTS}
    assert faults.keys() == SEE_NOTHING & found.keys(), faults
    assert {verdict.result for verdict in faults.values()} <= {NETWORK_DIFFERS}


def _in_numpy(case: Any) -> bool:
    return all(isinstance(value, np.ndarray | np.generic) for value in case.data_sets[0][0])
