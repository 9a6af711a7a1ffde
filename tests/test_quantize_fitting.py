"""What formats are fitted by: scales that move cancel, inputs are seen as they are, rounding is as good as it can be."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from suture.runtime.graphs import graph_of
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.quantize.balance import find_groups
from suture.surgery.quantize.feedback import Feedback
from suture.surgery.quantize.formats import FORMATS, FP8, INT4, INT8
from suture.surgery.quantize.inputs import Inputs
from suture.surgery.quantize.linears import find_linears
from suture.surgery.quantize.observe import observe
from suture.surgery.quantize.rounding import block_scales, dequantised, quantise, round_to
from suture.surgery.quantize.slabs import balanced_slabs
from suture.surgery.reports.report import SurgeryReport
from suture.surgery.runner import make_portable
from tests.graphs import weightless


@pytest.mark.parametrize("source", ["tiny-qwen", "torch213_dynamo_llama_op23_float16"])
def test_scales_that_move_cancel(tiny_export, tmp_path, source):
    """Where every product's input is divided by numbers and its weight multiplied by them, nothing changes: through
    norms, gated products and, with fewer heads for values than for queries, attention."""
    path = tiny_export / "model.onnx"
    if source != "tiny-qwen":
        path = tmp_path / "model.onnx"
        onnx.save(weightless.load(source), path)
    graph = files.read(path)
    make_portable(graph, make_plan(SurgeryOptions(capacity=64)).portable, SurgeryReport())
    before = graph_of(files.to_model(graph), graph.root, "before")
    linears = [linear for linear in find_linears(graph) if not linear.is_head]
    groups = find_groups(graph, linears, fold=True)
    assert all(group.divide is not None for group in groups)
    assert len(groups) == 4 * graph.signature.layers
    random = torch.Generator().manual_seed(0)
    for group in groups:
        scales = group.divide(torch.rand(group.linears[0].features, generator=random) + 0.5)
        for linear in group.linears:
            linear.columns = scales
    for linear in linears:
        rows = torch.cat([rows for _, rows in balanced_slabs(graph, linear)])
        array = (rows if linear.by_output else rows.T).contiguous().numpy().astype(linear.weight.dtype)
        linear.node.inputs[1] = type(linear.weight)(graph.unique("balanced"), array)
        if linear.bias is not None and linear.rows is not None:
            bias = graph.constant(linear.bias) * linear.rows.numpy()
            linear.node.inputs[2] = type(linear.weight)(graph.unique("bias"), bias.astype(array.dtype))
    after = graph_of(files.to_model(graph), graph.root, "after")
    tokens = np.arange(14).reshape(2, 7)
    found = [each.decoder(2).step(tokens, np.full(2, 7), np.ones(2, np.float32)).astype(float) for each in (before, after)]
    tolerance = 1e-5 if graph.signature.dtype == TensorProto.FLOAT else 1e-2
    assert np.abs(found[0] - found[1]).max() < tolerance * np.abs(found[0]).max()
    assert np.abs(found[0]).max() > 0.1


def test_a_segment_at_a_time_sees_the_same(tiny_export):
    graph = files.read(tiny_export / "model.onnx")
    make_portable(graph, make_plan(SurgeryOptions(capacity=64)).portable, SurgeryReport())
    wanted = [linear.x for linear in find_linears(graph)]
    windows = np.arange(48).reshape(2, 24)
    seen = []
    for options in ({}, {"segment": 1 << 19}):
        seen.append({tensor.name: [] for tensor in wanted})
        for tensor, values in observe(graph, wanted, windows, **options):
            seen[-1][tensor.name].append(values)
    whole, parts = seen
    for name, values in whole.items():
        assert len(values) == len(parts[name]) == 2
        assert all(np.abs(a - b).max() <= 1e-5 * np.abs(a).max() for a, b in zip(values, parts[name]))


@pytest.mark.parametrize(("values", "block"), [(INT4, 32), (INT8, 64), (FP8, 64)])
def test_rounding_keeps_what_is_exact_and_clips_where_that_helps(values, block):
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 64, generator=random)
    rows[0] = 0
    q, scales = quantise(rows, values, block, TensorProto.FLOAT16)
    assert values.least <= q.min() < 0 < q.max() <= values.largest
    spread = scales.repeat_interleave(block, dim=1)
    again, _ = quantise(q * spread, values, block, TensorProto.FLOAT16)
    assert torch.equal(q[1:], again[1:])
    assert torch.equal(q[0], torch.zeros(64))
    clipped = block_scales(rows, values, block, TensorProto.FLOAT16, torch.ones(64)).repeat_interleave(block, dim=1)
    plain = (q * spread - rows).square().sum()
    better = (round_to(rows / clipped, values) * clipped - rows).square().sum()
    assert better <= plain
    assert better < plain or values is not INT4


def test_later_weights_make_up_for_earlier_ones():
    """The outputs' error on inputs that go together falls far below that of rounding to the nearest; on inputs that do
    not, both are the same."""
    random = torch.Generator().manual_seed(2)
    rows, mixed = torch.randn(48, 600, generator=random), torch.randn(24, 600, generator=random)
    alone, together = torch.eye(600), torch.randn(800, 24, generator=random) @ mixed
    together += 0.1 * torch.randn(together.shape, generator=random)
    nearest, scales = quantise(rows, INT4, 24, TensorProto.FLOAT)
    for x, ratio in ((alone, 1), (together, 0.5)):
        inputs = Inputs.of(600)
        for part in x.split(100):
            inputs.add(part, FORMATS["int4-awq"], 1)
        assert [len(products) for products in inputs.products] == [512, 88]
        q = Feedback(inputs, torch.ones(600)).rounded(rows, scales, INT4)
        assert torch.equal(q, q.round())
        assert q.min() >= -8
        assert q.max() <= 7
        errors = [(x @ (dequantised(each, scales) - rows).T).square().sum() for each in (nearest, q)]
        assert errors[1] <= ratio * errors[0]
        assert (errors[1] == errors[0]) == (ratio == 1)
        exact = (together @ (dequantised(q, scales) - rows).T).square().sum()
        assert x is alone or 0.5 * exact < inputs.error(dequantised(q, scales) - rows) < 2 * exact
