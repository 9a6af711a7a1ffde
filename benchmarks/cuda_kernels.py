"""python -m benchmarks.cuda_kernels [--out FILE]

What onnxruntime's CUDA provider has kernels for, and what it computes wrongly: the table that surgery reads on a machine
without a GPU. Needs a GPU and onnxruntime-gpu; takes some minutes. Writes core/cuda_kernels.json:

    kernels   operator → version → floating-point type → whether there is a kernel. A version counts from the opset in which
              the operator was last defined. Found by sessions that may not fall back to the CPU, of onnx's own node tests at that
              version and in that type; operators that onnxruntime inlines count where all that they consist of has a kernel.
    wrong     operator → the node tests whose outputs are wrong on CUDA, in float32 without TF32
    attention form → type → head_dim → the shortest number of keys with wrong outputs, among KEYS
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, defs, helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from benchmarks.node_tests import node_tests
from suture.core.command import CommandParser, run
from suture.core.errors import UserError
from suture.core.progress import counted

OUT = Path(__file__).parents[1] / "core" / "cuda_kernels.json"
NEWEST = 24  # the opset of portable graphs
OLDEST = 7  # the first that onnxruntime supports
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
TRIED = 6  # node tests of an operator, until one has a kernel
HEAD_DIMS = (*range(8, 264, 8), 320, 512)
KEYS = (16, 77, 128, 1024)
HEADS, QUERIES = 4, 64
FORMS = {
    "plain": {},
    "causal": {"causal": True},
    "grouped": {"kv_heads": 2},
    "masked": {"mask": TensorProto.BOOL},
    "causal, masked": {"causal": True, "mask": TensorProto.BOOL},
    "grouped, masked": {"kv_heads": 2, "mask": TensorProto.BOOL},
    "grouped, causal, masked": {"kv_heads": 2, "causal": True, "mask": TensorProto.BOOL},
}
LOADING = (ort_errors.Fail, ort_errors.NotImplemented, ort_errors.InvalidGraph, ort_errors.InvalidArgument,
           ort_errors.RuntimeException)  # fmt: skip
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 6e-2}  # of the largest value


def main() -> int:
    description, prog = __doc__.split("\n", 2)[2].strip(), "python -m benchmarks.cuda_kernels"
    parser = CommandParser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="where the table is written (default: core/)")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        raise UserError("CUDA", "torch finds no GPU here, and the table is made on one", "run it where one is")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise UserError("CUDA", "onnxruntime has no CUDA provider here", "install onnxruntime-gpu")
    cases = _by_operator(node_tests())
    table = {
        "onnxruntime": onnxruntime.__version__,
        "device": torch.cuda.get_device_name(),
        "opset": NEWEST,
        "kernels": {op: found for op, each in _counted("kernels", cases) if (found := _kernels(op, each))},
        "wrong": {op: wrong for op, each in _counted("outputs", cases) if (wrong := [*_wrong(each)])},
        "attention": {form: {name: _attention(name, **settings) for name in TYPES} for form, settings in FORMS.items()},
    }
    out.write_text(_lines(table) + "\n")
    print(f"{out}: {len(table['kernels'])} operators, wrong: {', '.join(table['wrong']) or 'none'}")
    return 0


def _lines(table: dict, depth: int = 2) -> str:
    """JSON with a line for each operator, and for each form of attention."""
    if depth == 0 or not isinstance(table, dict):
        return json.dumps(table)
    return "{\n" + ",\n".join(f'"{key}": {_lines(value, depth - 1)}' for key, value in table.items()) + "\n}"


def _counted(title: str, cases: dict[str, list]) -> Iterator[tuple[str, list]]:
    return counted(title, "operators", sorted(cases.items()), len(cases))


def _by_operator(cases: Iterable) -> dict[str, list]:
    """The node tests of each standard operator that have it alone and read or write floating-point numbers."""
    found = defaultdict(list)
    for case in cases:
        graph = case.model.graph
        if len(graph.node) == 1 and graph.node[0].domain == "" and _floating(graph):
            found[graph.node[0].op_type].append(case)
    return found


def _floating(graph: onnx.GraphProto) -> bool:
    return any(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in (*graph.input, *graph.output))


def _kernels(op: str, cases: list) -> dict[str, dict[str, bool]]:
    versions = {
        schema.since_version for schema in defs.get_all_schemas_with_history() if (schema.domain, schema.name) == ("", op)
    }
    found = {}
    for version in sorted(versions):
        if version > NEWEST:
            continue
        opset = max(version, OLDEST)
        answers = {name: _has_kernel(cases, opset, dtype) for name, dtype in TYPES.items()}
        if known := {name: answer for name, answer in answers.items() if answer is not None}:
            found[str(version)] = known
    return found


def _has_kernel(cases: list, opset: int, dtype: int) -> bool | None:
    """None where no node test is valid at this opset and in this type."""
    valid = [model for case in cases for model in _at(case.model, opset, dtype)]
    return any(_runs_on_cuda(model) for model in valid[:TRIED]) if valid else None


def _at(model: onnx.ModelProto, opset: int, dtype: int) -> Iterator[onnx.ModelProto]:
    """The model at this opset with its float32 tensors in this type: all of them, and those that share the first one's by
    the operator's schema; where that is valid."""
    for only_main in (False, True):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        changed.ir_version = 10
        changed.opset_import[0].version = opset
        try:
            for value in _floats(changed.graph, defs.get_schema(changed.graph.node[0].op_type, opset), only_main):
                value.type.tensor_type.elem_type = dtype
            onnx.checker.check_model(changed)
            onnx.shape_inference.infer_shapes(changed, check_type=True, strict_mode=True)
        except (defs.SchemaError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            continue
        yield changed


def _floats(graph: onnx.GraphProto, schema: defs.OpSchema, only_main: bool) -> list[onnx.ValueInfoProto]:
    node, typed = graph.node[0], []
    for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for place, name in enumerate(names):
            typed += [(name, formal[min(place, len(formal) - 1)].type_str)] if formal else []
    values = {value.name: value for value in (*graph.input, *graph.output)}
    floats = [(name, by) for name, by in typed if name and values[name].type.tensor_type.elem_type == TensorProto.FLOAT]
    return [values[name] for name, by in floats if not only_main or by == floats[0][1]]


def _session(model: onnx.ModelProto, alone: bool = False) -> onnxruntime.InferenceSession:
    """On CUDA, `alone` without a provider to fall back to: it is not made where a node has no kernel."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(alone)))
    providers = [("CUDAExecutionProvider", {"use_tf32": "0"}), *([] if alone else ["CPUExecutionProvider"])]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def _runs_on_cuda(model: onnx.ModelProto) -> bool:
    try:
        _session(model, alone=True)
    except LOADING:
        return False
    return True


def _wrong(cases: list) -> Iterator[str]:
    """Names of node tests that run on CUDA alone, with outputs that are not those expected."""
    for case in cases:
        if case.model.opset_import[0].version > NEWEST and not any(_at(case.model, NEWEST, TensorProto.FLOAT)):
            continue
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        model.ir_version = 10
        model.opset_import[0].version = min(model.opset_import[0].version, NEWEST)
        if not _runs_on_cuda(model):
            continue
        session = _session(model)
        for inputs, expected in case.data_sets:
            if any(not isinstance(value, (np.ndarray, np.generic)) for value in (*inputs, *expected)):
                continue  # sequences, and types that numpy does not have
            try:
                outputs = session.run(None, dict(zip([each.name for each in model.graph.input], map(np.asarray, inputs))))
            except LOADING as error:  # what it cannot run is not a wrong output
                print(f"{case.name}: {str(error)[:150]}", file=sys.stderr)
                continue
            if not all(_close(ours, theirs) for ours, theirs in zip(outputs, expected)):
                yield case.name


def _close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    if theirs.dtype.kind not in "fiub":
        return True
    allowed = TOLERANCE["float32"] * max(1.0, float(np.abs(np.nan_to_num(theirs.astype(np.float64))).max(initial=0)))
    return ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=0, atol=allowed, equal_nan=True)


def _attention(name: str, causal: bool = False, kv_heads: int = HEADS, mask: int = 0) -> dict[str, int]:
    """head_dim → the shortest of KEYS for which Attention of this form and type is wrong."""
    session = _session(_attention_model(TYPES[name], causal, mask))
    wrong = {}
    for head_dim in HEAD_DIMS:
        failed = (keys for keys in KEYS if not _attends(session, name, head_dim, keys, causal, kv_heads, bool(mask)))
        if (shortest := next(failed, None)) is not None:
            wrong[str(head_dim)] = shortest
    return wrong


def _attention_model(dtype: int, causal: bool, mask: int) -> onnx.ModelProto:
    types = {"q": dtype, "k": dtype, "v": dtype} | ({"mask": mask} if mask else {})
    node = helper.make_node("Attention", list(types), ["y"], is_causal=int(causal))
    ranks = {"mask": 2}
    inputs = [helper.make_tensor_value_info(name, each, [None] * ranks.get(name, 4)) for name, each in types.items()]
    graph = helper.make_graph([node], "attention", inputs, [helper.make_tensor_value_info("y", dtype, [None] * 4)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", NEWEST)], ir_version=10)


def _attends(session, name: str, head_dim: int, keys: int, causal: bool, kv_heads: int, masked: bool) -> bool:
    """Whether the outputs are those of torch in float32 for the same inputs; the mask hides nothing."""
    torch.manual_seed(head_dim * keys)
    shapes = {"q": (2, HEADS, QUERIES, head_dim), "k": (2, kv_heads, keys, head_dim), "v": (2, kv_heads, keys, head_dim)}
    given = {each: torch.randn(shape).to(getattr(torch, name)).cuda() for each, shape in shapes.items()}
    q, k, v = (value.float() for value in given.values())
    seen = torch.ones(QUERIES, keys, dtype=torch.bool, device=q.device)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen.tril() if causal else seen, enable_gqa=True)
    bound = session.io_binding()
    for each, value in (given | ({"mask": seen} if masked else {})).items():
        dtype = np.bool_ if each == "mask" else TYPES[name]
        bound.bind_input(each, "cuda", 0, dtype, tuple(value.shape), value.data_ptr())
    bound.bind_output("y", "cuda")
    torch.cuda.synchronize()
    session.run_with_iobinding(bound)
    y = torch.from_dlpack(bound.get_outputs()[0]).float()
    return bool((y - expected).abs().max() <= TOLERANCE[name] * expected.abs().max())


if __name__ == "__main__":
    run("cuda_kernels", main)
