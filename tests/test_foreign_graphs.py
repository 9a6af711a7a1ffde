"""Graphs of others against the table of what surgery is to make of them: interface, results, TensorRT's parser, fusions."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from foreign_graphs import MADE, OTHERS, OWN, PUBLIC, Row, load

from suture.build.options import BuildOptions
from suture.build.stage import ENGINE, build
from suture.core.errors import UserError
from suture.core.network.evaluate import Evaluator
from suture.core.network.inputs import make_feeds
from suture.core.network.parse import Refused, describe
from suture.core.network.runner import to_numpy
from suture.core.repairable import TYPES_ONLY, since
from suture.surgery.graph import files
from suture.surgery.graph.opsets import ADAPTERS
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan
from suture.surgery.verification import verify

pytestmark = pytest.mark.usefixtures("one_thread")
CAPACITY = 64
HALF = 1e-2
SIZES = (2, 3, 5, 4)  # of dynamic axes, by the name that the source gives them, in turn


# forms that shorter graphs have as well
TWICE = ("dim_names_mask_gemma2", "dim_names_presents", "one_token_llama31", "sd15_unet_d18")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in TWICE)) for name in OWN])
def test_own(name, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(load(name), path)
    check(path, OWN[name], tmp_path)


@pytest.mark.parametrize("name", MADE)
def test_made(name, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(load(name), path)
    check(path, MADE[name], tmp_path)


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="others' files are not part of the repository")
@pytest.mark.parametrize("name", OTHERS)
def test_others(name, tmp_path):
    check(PUBLIC / f"{name}.onnx", OTHERS[name], tmp_path)


def test_of_every_operator_that_changed_it_is_known_how():
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    changed = {name for name in names if len({since(name, version) for version in range(9, 25)} - {None}) > 1}
    assert set(ADAPTERS) | TYPES_ONLY == changed
    assert not set(ADAPTERS) & TYPES_ONLY


def check(path: Path, row: Row, tmp_path: Path) -> None:
    """Refused as the row says, or through: interface kept, equal in onnxruntime, parsed, network equal, engine built."""
    if row.refused is not None:
        with pytest.raises(UserError, match=row.refused) as refusal:
            run_plan(files.read(path, branch=row.branch), make_plan(SurgeryOptions(capacity=CAPACITY)))
        assert "\n" not in str(refusal.value)
        return
    graph = files.read(path)
    source = onnx.load(path)
    caches, root = graph.signature.caches, graph.root
    checks = [verify.Verifier(onnx.load(path, load_external_data=False), graph.signature, root)] if caches else []
    portable, lowered, _ = run_plan(graph, make_plan(SurgeryOptions(capacity=CAPACITY)), *checks)
    model = files.to_model(portable)
    assert (portable.signature.static if caches else None) == row.static
    found = Counter(node.op_type for node in model.graph.node)
    assert {op: found[op] for op in row.fused} == row.fused
    if not caches:
        assert interface(model) == interface(source)
        compare(source, model)
    if row.parsed:
        network = describe(files.to_model(lowered).SerializeToString(), path, root)
        inputs = [each.values for each in make_feeds(model)] if caches else [feeds(source)]
        compared = compare_network(model, Evaluator(network, "cpu"), inputs)
        assert bool(compared) == row.run
        assert engine_is_built(files.to_model(lowered), root, tmp_path) == row.built
    else:
        with pytest.raises(Refused):
            describe(files.to_model(lowered).SerializeToString(), path, root)


def engine_is_built(lowered: onnx.ModelProto, root: Path, tmp_path: Path) -> bool:
    given = onnx.ModelProto.FromString(lowered.SerializeToString())
    onnx.load_external_data_for_model(given, str(root))
    onnx.save(files.without_shapes(given), tmp_path / "model.trt.onnx")
    try:
        build(tmp_path / "model.trt.onnx", tmp_path / "build", BuildOptions(compute_capability=("8.9",), profiles="one"))
    except UserError as error:
        print(error)
        return False
    return (tmp_path / "build" / ENGINE).stat().st_size > 0


def interface(model: onnx.ModelProto) -> list[tuple]:
    """Names, types and, where the source gives any, shapes, in order."""
    weights = {tensor.name for tensor in model.graph.initializer}
    ends = [value for value in (*model.graph.input, *model.graph.output) if value.name not in weights]
    outputs = {value.name for value in model.graph.output}
    return [(value.name, *((kind(value), dims(value)) if value.name not in outputs else ())) for value in ends]


def kind(value: onnx.ValueInfoProto) -> int:
    return value.type.tensor_type.elem_type


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param if dim.dim_value < 1 else dim.dim_value for dim in value.type.tensor_type.shape.dim]


def compare(source: onnx.ModelProto, portable: onnx.ModelProto) -> None:
    given = feeds(source)
    try:
        expected = run(source, given)
    except Exception:  # onnxruntime's errors share no public base; what it cannot run has nothing to compare with
        return
    found = run(portable, given)
    for name, values in expected.items():
        assert values.shape == found[name].shape
        assert values.dtype == found[name].dtype
        largest = np.abs(values.astype(np.float64)).max(initial=0) or 1.0
        tolerance = HALF if values.dtype == np.float16 else 1e-5
        assert np.abs(values.astype(np.float64) - found[name].astype(np.float64)).max(initial=0) <= tolerance * largest, name


def compare_network(portable: onnx.ModelProto, evaluate: Evaluator, inputs: list[dict[str, np.ndarray]]) -> int:
    """Of how many sets of inputs, those that onnxruntime runs, the outputs are equal."""
    compared = 0
    for given in inputs:
        try:
            expected = run(portable, given)
        except Exception:  # as above
            continue
        compared += 1
        found = evaluate({name: given[name] for name in evaluate.network.inputs})
        for name, values in expected.items():
            own = to_numpy(found[name]).astype(np.float64)
            assert own.shape == values.shape
            largest = np.abs(values.astype(np.float64)).max(initial=0) or 1.0
            tolerance = {"f": HALF if values.dtype == np.float16 else 1e-5}.get(values.dtype.kind, 0)
            assert np.abs(values.astype(np.float64) - own).max(initial=0) <= tolerance * largest, name
    return compared


def run(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, given)))


def feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Random inputs; of a stacked past three slots, of all masks ones but for the last row's first column."""
    rng, sizes, made = np.random.default_rng(0), {}, {}
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    stacked = any(len(value.type.tensor_type.shape.dim) == 5 for value in inputs)
    known = {"past_seq_len": 3, "total_seq_len": 6, "seq_len": 3, "batch_size": 2} if stacked else {}
    for value in inputs:
        shape = [
            size if isinstance(size, int) else known.get(size, sizes.setdefault(size, SIZES[len(sizes) % len(SIZES)]))
            for size in dims(value)
        ]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind(value))
        if "mask" in value.name:
            values = np.ones(shape)
            values[-1, ..., :1] = 0
        elif dtype.kind == "b":
            values = rng.random(shape) < 0.7
        else:
            values = rng.integers(0, 2, shape) if dtype.kind in "iu" else rng.standard_normal(shape)
        made[value.name] = np.asarray(values).astype(dtype)
    return made
