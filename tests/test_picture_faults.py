"""Faults that benchmarks.pictures plants in a UNet, whether its pictures show them or not: level 2 finds each."""

import numpy as np
import onnx
import pytest
from foreign_graphs import load
from onnx import TensorProto, helper
from test_vision_graphs import error, operated, run

from benchmarks.pictures import FAULTS
from suture.core.network.inputs import make_noise
from suture.core.tolerances import between_sessions

pytestmark = pytest.mark.usefixtures("one_thread")
OF_CONTROLS = "residuals_dropped"  # which this UNet does not take


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> tuple[onnx.ModelProto, dict, list[np.ndarray]]:
    """A UNet's portable graph, inputs, and what its source gives."""
    source = load("sd15_unet_d18")
    _, time, _ = source.graph.input
    for node in source.graph.node:
        node.input[:] = ["timestep" if name == time.name else name for name in node.input]
    time.name = "timestep"
    portable, _ = operated(source, tmp_path_factory.mktemp("unet"))
    feeds = make_noise(source, 0, {"timestep": 1000})
    return portable, feeds, run(source, feeds)


def test_without_a_fault_they_agree(graphs):
    portable, feeds, expected = graphs
    assert error(expected, run(portable, feeds)) < between_sessions({TensorProto.FLOAT})


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {OF_CONTROLS}))
def test_a_fault_is_found(fault, graphs):
    portable, feeds, expected = graphs
    damaged = onnx.ModelProto()
    damaged.CopyFrom(portable)
    FAULTS[fault](damaged.graph)
    assert damaged.graph != portable.graph
    assert error(expected, run(damaged, feeds)) > between_sessions({TensorProto.FLOAT16})


def test_residuals_that_are_dropped_are_no_longer_read():
    names = ["down_block_res_sample_0", "x"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [2]) for name in names]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2])
    model = helper.make_model(helper.make_graph([helper.make_node("Add", ["x", names[0]], ["y"])], "g", inputs, [output]))
    FAULTS[OF_CONTROLS](model.graph)
    feeds = {name: np.ones(2, np.float16) for name in names}
    assert run(model, feeds)[0].tolist() == [1, 1]
