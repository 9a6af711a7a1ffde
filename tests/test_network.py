"""The network evaluator on whole decoders: it agrees with onnxruntime on good ones, and catches each planted fault."""

import dataclasses
from pathlib import Path

import ml_dtypes
import network_graphs as graphs
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from suture.core.as_written import open_session
from suture.core.errors import UserError
from suture.core.findings import Finding
from suture.core.network.audit import audit
from suture.core.network.compare import FeedsOutcome, compare, default_tolerance
from suture.core.network.description import Layer, Network
from suture.core.network.evaluate import EvaluationError, Evaluator
from suture.core.network.graph_audit import audit_graph
from suture.core.network.inputs import make_feeds
from suture.core.network.parse import describe, parse
from suture.core.network.quantization import quantize
from suture.core.network.runner import to_numpy
from suture.core.weights import load_graph

ROOT = Path(__file__).parents[1]
DIALECTS = ROOT.parent / "shared" / "dialects"


pytestmark = pytest.mark.usefixtures("one_thread")


def save(model: onnx.ModelProto, folder: Path, name: str) -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return path


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]> g {text}')


def network_of(path: Path):
    return describe(path.read_bytes(), path, path.parent)


def outcomes(model: onnx.ModelProto, reference: onnx.ModelProto | None, folder: Path) -> tuple[list[FeedsOutcome], float]:
    path = save(model, folder, "model")
    other = path if reference is None else save(reference, folder, "reference")
    network = network_of(path)
    tolerance = default_tolerance(network)
    return compare(Evaluator(network, "cpu"), other, make_feeds(model), tolerance), tolerance


def differing(model: onnx.ModelProto, reference: onnx.ModelProto | None, folder: Path) -> set[str]:
    found, tolerance = outcomes(model, reference, folder)
    return {output.tensor for outcome in found for output in outcome.outputs if output.beyond(tolerance)}


@pytest.mark.parametrize("attention", [graphs.MASKED, graphs.LENGTHS], ids=["mask", "lengths"])
@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_lowered_decoder_agrees(dtype, attention, tmp_path):
    found, tolerance = outcomes(graphs.lowered(dtype, attention), graphs.portable(dtype), tmp_path)
    assert [outcome.feeds for outcome in found] == ["prompt", "chunk", "decode"]
    errors = [output.error for outcome in found for output in outcome.outputs]
    assert len(errors) == 3 * (1 + 2 * graphs.LAYERS)
    assert max(errors) < tolerance
    assert tolerance == {"float": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}[dtype]
    assert not audit_errors(graphs.lowered(dtype, attention), tmp_path)


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_steps_that_carry_their_cache(dtype, tmp_path):
    """Prompt, chunk and decode of rows that advance by different numbers of tokens, each side with its own caches."""
    path, portable = save(graphs.lowered(dtype), tmp_path, "model"), graphs.portable(dtype)
    evaluate, session = Evaluator(network_of(path), "cpu"), open_session(portable, tmp_path, "portable")
    rng, kind = np.random.default_rng(5), {"float": np.float32, "float16": np.float16}[dtype]
    shape = (3, graphs.KV_HEADS, graphs.CAPACITY, graphs.HEAD_DIM)
    names = [f"{part}_{layer}" for layer in range(graphs.LAYERS) for part in "kv"]
    ours = {name: rng.standard_normal(shape).astype(kind) for name in names}
    theirs, lengths = dict(ours), np.zeros(3, np.int64)
    for counts in ([5, 3, 1], [2, 0, 2], [1, 1, 0], [1, 1, 1]):
        width = max(counts)
        positions = np.minimum(lengths[:, None] + np.arange(width), graphs.CAPACITY - 1)
        feeds = {
            "input_ids": rng.integers(0, graphs.VOCAB, (3, width)), "position_ids": positions, "write_indices": lengths
        }  # fmt: skip
        found = evaluate(feeds | {f"past_{name}": value for name, value in ours.items()})
        found = {name: to_numpy(value) for name, value in found.items()}
        outputs = [output.name for output in session.get_outputs()]
        past = {f"past_{name}": value for name, value in theirs.items()}
        expected = dict(zip(outputs, session.run(outputs, feeds | past)))
        for row, count in enumerate(counts):
            error = np.abs(found["logits"][row, :count] - expected["logits"][row, :count]).max(initial=0)
            assert error <= (1e-5 if dtype == "float" else 1e-2) * np.abs(expected["logits"]).max()
        ours = {name: found[f"present_{name}"] for name in names}
        theirs = {name: expected[f"present_{name}"] for name in names}
        lengths = lengths + counts


FAULTS = {
    "wrong scale": {"scale": np.float32(0.3)},
    "mask one position off": {"mask": graphs.MASK.replace("LessOrEqual(slots, seen)", "Less(slots, seen)")},
    "mask shows one slot too many": {"slots": np.arange(graphs.CAPACITY)[None, None, None] - 1},
    "key and value swapped": {"attention": graphs.SWAPPED},
    "cache one slot late": {"write": "late"},
    "NaN": {"norm": np.full(graphs.HIDDEN, np.nan)},
}


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_comparison_catches(fault, dtype, tmp_path):
    change = dict(FAULTS[fault])
    if "norm" in change:
        change["norm"] = change["norm"].astype(np.float16 if dtype == "float16" else np.float32)
    assert "logits" in differing(graphs.lowered(dtype, **change), graphs.portable(dtype), tmp_path)


def test_nan_on_both_sides_is_a_difference(tmp_path):
    model = parsed("(float[N] x) => (float[N] y) { y = Sqrt(x) }")
    found, tolerance = outcomes(model, None, tmp_path)
    assert found[0].outputs[0].beyond(tolerance)
    assert found[0].outputs[0].problem == "NaN in onnxruntime and network"


def audited(network: Network, model: onnx.ModelProto) -> list[Finding]:
    return [*audit_graph(model, Path()), *audit(network, model)]


def audit_errors(model: onnx.ModelProto, folder: Path) -> list[str]:
    path = save(model, folder, "audited")
    return [str(finding) for finding in audited(network_of(path), model) if finding.severity == "error"]


@pytest.mark.parametrize("dtype", ["float16"])
def test_lengths_left_in_are_named_and_caught(dtype, tmp_path):
    """The parser drops nonpad_kv_seqlen in silence; the same file disagrees with itself, from the first Attention on."""
    model = graphs.portable(dtype)
    name = next(node.name or node.output[0] for node in model.graph.node if node.op_type == "Attention")
    errors = audit_errors(model, tmp_path)
    assert any(name in error and "nonpad_kv_seqlen (lengths)" in error for error in errors)
    found, tolerance = outcomes(model, None, tmp_path)
    decode = found[-1]
    assert any(output.beyond(tolerance) for output in decode.outputs)
    assert (decode.divergence.op, decode.divergence.difference.tensor) == ("Attention", "a_0")


def test_causal_attention_over_a_cache_is_named_and_caught(tmp_path):
    model = graphs.portable("float16", graphs.CAUSAL_ONLY)
    assert any("is_causal aligns" in error for error in audit_errors(model, tmp_path))
    assert "logits" in differing(model, graphs.portable("float16"), tmp_path)


AUDITED = {
    "an input that nothing uses": (
        "(float[N,4] x, float[N,4] idle) => (float[N,4] y) { y = Relu(x) }", "warning", "input idle: nothing in the graph"
    ),
    "an input of a dead node": (
        "(float[N,4] x, float[N,4] idle) => (float[N,4] y) { z = Neg(idle) y = Relu(x) }", "error", "input idle"
    ),
    "an initializer that nothing uses": (
        "(float[N,4] x) => (float[N,4] y) <float[2] w = {1, 2}> { y = Relu(x) }", "warning", "weight w: nothing"
    ),
    "a misread default": ("(float[4,4] x) => (float[4,4] y) { y = Trilu(x) }", "error", "write upper=1"),
    "float32 attention": (
        "(float[B,2,S,16] q, float[B,2,S,16] k) => (float[B,2,S,16] y) { y = Attention(q, k, k) }",
        "warning", "which it is not marked for",
    ),
    "heads too narrow": (
        "(float16[B,2,S,8] q, float16[B,2,S,8] k) => (float16[B,2,S,8] y) { y = Attention(q, k, k) }",
        "error", "head_dim 8",
    ),
    "a cache that is not an output": (
        "(float16[B,2,8,16] past, float16[B,2,S,16] k, int64[B] w) => (float16[B,2,8,16] y)"
        "{ p = TensorScatter<axis = -2>(past, k, w) y = Identity(p) }", "error", "not directly a network output",
    ),
    "a cache that is not an input": (
        "(float16[B,2,8,16] past, float16[B,2,S,16] k, int64[B] w) => (float16[B,2,8,16] y)"
        "{ p = Identity(past) y = TensorScatter<axis = -2>(p, k, w) }", "error", "not directly a network input",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", AUDITED)
def test_audit_finds(fault, tmp_path):
    text, severity, expected = AUDITED[fault]
    model = parsed(text)
    path = save(model, tmp_path, "model")
    found = [(finding.severity, str(finding)) for finding in audited(network_of(path), model)]
    assert any(kind == severity and expected in line for kind, line in found), found


def test_a_unidirectional_contrib_attention_is_named():
    text = "(float[B,S,16] q, float[B,T,16] k) => (float[B,S,16] y) { y = com.microsoft.MultiHeadAttention<CAUSAL>(q, k, k) }"
    for causal, named in (("num_heads = 2, unidirectional = 1", True), ("num_heads = 2", False)):
        imports = '<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]>'
        model = onnx.parser.parse_model(f"{imports} g {text.replace('CAUSAL', causal)}")
        assert any("more keys than queries" in str(finding) for finding in audit_graph(model, Path())) == named


def test_audit_names_a_changed_dtype_and_a_lost_node(tmp_path):
    """As if the parser had typed a tensor otherwise, and had made no layer of a node."""
    model = parsed("(float[N] x) => (float[N] y) { z = Neg(x) y = Relu(z) }")
    network = network_of(save(model, tmp_path, "model"))
    assert audit(network, model) == []
    retyped = dataclasses.replace(
        network, tensors=network.tensors | {"z": dataclasses.replace(network.tensors["z"], dtype="HALF")}
    )
    assert any("z is FLOAT in the graph and HALF" in str(finding) for finding in audit(retyped, model))
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    renamed.graph.node[0].name, renamed.graph.node[0].output[0], renamed.graph.node[1].input[0] = "lost", "u", "u"
    assert any("Neg lost: no layer" in str(finding) for finding in audit(network, renamed))


@pytest.mark.parametrize(
    "dialect", sorted(path.name for path in DIALECTS.glob("[!.]*") if not path.name.startswith("ort_genai"))
)
@pytest.mark.sample(2)
def test_graphs_of_other_exporters(dialect):
    path = DIALECTS / dialect / "model.onnx"
    network = parse(path)
    tolerance = default_tolerance(network)
    for outcome in compare(Evaluator(network, "cpu"), path, make_feeds(load_graph(path)), tolerance):
        assert max(output.error for output in outcome.outputs) < tolerance
    assert not [finding for finding in audit(network, load_graph(path)) if finding.severity == "error"]


def test_declared_dtype_and_shape_are_checked(tmp_path):
    model = graphs.lowered("float16")
    network = network_of(save(model, tmp_path, "model"))
    feeds = make_feeds(model)[0].values
    for change, message in (({"dtype": "FLOAT"}, "declares logits as FLOAT"), ({"shape": (-1, -1, 49)}, "49")):
        lied = dataclasses.replace(network.tensors["logits"], **change)
        wrong = dataclasses.replace(network, tensors=network.tensors | {"logits": lied})
        with pytest.raises(EvaluationError, match=message):
            Evaluator(wrong, "cpu")(feeds)


def test_a_wrong_or_missing_input_is_named(tmp_path):
    model = graphs.lowered("float16")
    evaluate, feeds = Evaluator(network_of(save(model, tmp_path, "model")), "cpu"), make_feeds(model)[0].values
    with pytest.raises(UserError, match="no value given for past_k_0"):
        evaluate({name: value for name, value in feeds.items() if name != "past_k_0"})
    with pytest.raises(UserError, match="input past_k_0 is HALF"):
        evaluate(feeds | {"past_k_0": feeds["past_k_0"].astype(np.float32)})


def test_weights_beside_the_graph_are_mapped_and_verified(tmp_path):
    """Large weights stay in their file; another file's values under the same name are noticed."""
    weight = np.random.default_rng(0).standard_normal((600, 600)).astype(np.float32)
    model = parsed("(float[N,600] x) => (float[N,600] y) { y = MatMul(x, w) }")
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    network = parse(path)
    x = np.eye(600, dtype=np.float32)[:2]
    assert torch.equal(Evaluator(network, "cpu")({"x": x})["y"], torch.from_numpy(weight[:2]))
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[7] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    with pytest.raises(UserError, match="other values of w"):
        Evaluator(network, "cpu")


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("FP8", ml_dtypes.float8_e4m3fn), ("FP4", ml_dtypes.float4_e2m1fn), ("INT4", ml_dtypes.int4)],
)
def test_narrow_quantization_rounds_as_ml_dtypes(target, dtype):
    """onnxruntime has no kernels for these; ties, both signs, and values beyond the range."""
    x = np.arange(-9, 9, 0.125, np.float32)
    limit = float(ml_dtypes.finfo(dtype).max) if target != "INT4" else None
    clipped = np.clip(x, -limit, limit) if limit else np.clip(np.round(x), -8, 7)
    layer = Layer("QUANTIZE", "q", None, (), (), {"to_type": target, "axis": -1})
    found = quantize(layer, torch.from_numpy(2 * x), torch.tensor(2.0))
    assert torch.equal(found.float(), torch.from_numpy(clipped.astype(dtype).astype(np.float32)))


def test_fp4_weights(tmp_path):
    """FP4 weights in blocks of 16, which onnxruntime does not run, against the product worked out here."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((32, 8)).astype(ml_dtypes.float4_e2m1fn)
    scale = rng.random((2, 8)).astype(np.float32)
    model = parsed(
        "(float[N,32] x) => (float[N,8] y) { d = DequantizeLinear<axis = 0, block_size = 16>(w, s) y = MatMul(x, d) }"
    )
    model.graph.initializer.extend([numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scale, "s")])
    x = rng.standard_normal((3, 32)).astype(np.float32)
    found = Evaluator(network_of(save(model, tmp_path, "model")), "cpu")({"x": x})["y"]
    expected = x @ (weight.astype(np.float32) * np.repeat(scale, 16, axis=0))
    assert np.abs(found.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
