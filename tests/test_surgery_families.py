"""Surgery on graphs of many families and exporters: what gets fused, that nothing is left, and that outputs stay equal."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from filelock import FileLock
from onnx import TensorProto
from onnx.numpy_helper import to_array

from suture.core.shadow_copy import DTYPE_ATTRIBUTES, float32_shadow_copy
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan
from tests.decoding import decode, largest_error
from tests.graphs import weightless

CAPACITY = 32
FUSED = ("Attention", "RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Swish", "Gelu", "TensorScatter")
DECOMPOSED = ("Softmax", "ReduceMean", "Sigmoid", "Erf", "Tanh")

llama = {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4, "Swish": 2, "TensorScatter": 4}
qwen3 = llama | {"RMSNormalization": 9}
gemma = {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4, "Gelu": 2, "TensorScatter": 4}
gpt2 = {"Attention": 2, "LayerNormalization": 5, "Gelu": 2, "TensorScatter": 4}
opt = {"Attention": 2, "LayerNormalization": 5, "TensorScatter": 4}  # ReLU
whisper = {"Attention": 4, "LayerNormalization": 7, "Gelu": 2, "TensorScatter": 4}
sam = {"Attention": 2, "LayerNormalization": 6, "Gelu": 2}
EXPECTED = {
    "optimum_onnx010_qwen2": llama,
    "torch213_dynamo_gpt2_op18_float32": gpt2,
    "torch213_dynamo_llama_op23_float16": llama,
    "torch213_dynamo_qwen2_op18_float32": llama,
    "torch213_static_ts_qwen2_op24_float16": llama,
    "torch213_torchscript_qwen2_op17_float32": llama,
    "bloom-dynamo-18-float32": gpt2 | {"LayerNormalization": 6},
    "bloom-torchscript-17-float32": gpt2 | {"LayerNormalization": 6},
    "gemma-dynamo-18-float32": gemma,
    "gemma3-dynamo-18-float32": gemma | {"RMSNormalization": 13},
    "gpt2-torchscript-14-float32": gpt2,
    "gpt2_mask-dynamo-18-float32": gpt2,
    "gptbigcode-dynamo-18-float32": gpt2,
    "gptbigcode-torchscript-17-float32": gpt2,
    "gptneox-dynamo-23-float16": gpt2 | {"RotaryEmbedding": 4},
    "gptneox-torchscript-17-float32": gpt2 | {"RotaryEmbedding": 4},
    "gptj-torchscript-17-float32": gpt2 | {"LayerNormalization": 3, "RotaryEmbedding": 4},
    "llama-dynamo-24-float16": llama,
    "llama-torchscript-14-float16": llama,
    "llama-torchscript-17-float32": llama,
    "mpt-torchscript-17-float32": gpt2,
    "opt-dynamo-18-float32": opt,
    "opt-torchscript-17-float32": opt,
    "phi3-dynamo-18-float32": llama,
    "phi3-torchscript-17-float32": llama,
    "qwen2_bare-dynamo-18-float32": llama,
    "qwen2_mask-torchscript-17-float32": llama,
    "qwen3-dynamo-23-float32": qwen3,
    "qwen3-torchscript-20-float32": qwen3,
    "sam_vision-dynamo-18-float32": sam,
    "sam_vision-torchscript-17-float32": sam,
    "whisper-dynamo-18-float32": whisper,
    "whisper-torchscript-17-float32": whisper,
    "whisper_encoder-dynamo-18-float32": {"Attention": 2, "LayerNormalization": 5, "Gelu": 4},
}


def operated(model: onnx.ModelProto, folder: Path, cache: str = "static"):
    """Surgery on a graph in memory: the portable graph and the report."""
    path = folder / "source.onnx"
    onnx.save(model, path)
    portable, _, report = run_plan(files.read(path), make_plan(SurgeryOptions(cache=cache, capacity=CAPACITY)))
    return files.to_model(portable), report


def counts(model: onnx.ModelProto, ops: tuple[str, ...]) -> dict[str, int]:
    found = Counter(node.op_type for node in model.graph.node)
    return {op: found[op] for op in ops if found[op]}


def outputs(model: onnx.ModelProto) -> np.ndarray:
    """The first output of a graph without caches, at random inputs."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feeds = {each.name: random.normal(size=each.shape).astype(dtypes[each.type]) for each in session.get_inputs()}
    return session.run(None, feeds)[0]


def error_between(source: onnx.ModelProto, portable: onnx.ModelProto) -> float:
    if not any("past" in value.name for value in source.graph.input):
        return largest_error({"output": outputs(source)}, {"output": outputs(portable)})
    return largest_error(decode(source, alone=True), decode(portable, alone=False))


def test_every_committed_graph_is_expected():
    assert set(weightless.names()) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.sample(
    "torch213_dynamo_[gl]*", "torch213_torch*", "*static*", "bloom-dynamo*", "gemma*", "gpt2-*", "gptneox-dynamo*", "gptj*",
    "gptbigcode-torch*", "llama-torchscript-14*", "mpt*", "opt-dynamo*", "phi3-torch*", "qwen2_bare*", "qwen3-dynamo*",
    "sam_vision-torch*", "whisper-dynamo*", "whisper_encoder*",
)  # fmt: skip
def test_fuses_all_and_changes_nothing(name, tmp_path):
    source = weightless.load(name)
    portable, report = operated(source, tmp_path)
    assert counts(portable, FUSED) == EXPECTED[name]
    assert counts(portable, DECOMPOSED) == {}
    assert report.unfused == []
    onnx.checker.check_model(portable, full_check=True)
    assert error_between(source, portable) < (2e-2 if name.endswith("float16") else 1e-4)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.endswith("float16")])
def test_bfloat16_fuses_as_float16_does(name, tmp_path):
    """onnxruntime's CPU cannot compute in bfloat16: masks and numbers are those of float32 shadow copies."""
    source = as_bfloat16(weightless.load(name))
    portable, report = operated(source, tmp_path)
    assert counts(portable, FUSED) == EXPECTED[name]
    assert counts(portable, DECOMPOSED) == {}
    assert report.unfused == []
    assert error_between(float32_shadow_copy(source), float32_shadow_copy(portable)) < 1e-4


def as_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with bfloat16 in place of float16."""
    half, brain = TensorProto.FLOAT16, TensorProto.BFLOAT16

    def convert(tensor: TensorProto) -> None:
        if tensor.data_type == half:
            tensor.CopyFrom(onnx.numpy_helper.from_array(to_array(tensor).astype(ml_dtypes.bfloat16), tensor.name))

    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = brain
    for tensor in model.graph.initializer:
        convert(tensor)
    for attribute in (attribute for node in model.graph.node for attribute in node.attribute):
        if attribute.type == onnx.AttributeProto.TENSOR:
            convert(attribute.t)
        elif attribute.name in DTYPE_ATTRIBUTES and attribute.i == half:
            attribute.i = brain
    return model


@pytest.mark.seconds
def test_keys_and_values_are_not_repeated(tmp_path):
    for name in ("torch213_torchscript_qwen2_op17_float32", "llama-dynamo-24-float16", "gptbigcode-dynamo-18-float32"):
        portable, _ = operated(weightless.load(name), tmp_path)
        caches = {value.name for value in portable.graph.output if value.name.startswith("present")}
        attentions = [node for node in portable.graph.node if node.op_type == "Attention"]
        assert {name for node in attentions for name in node.input[1:3]} == caches


@pytest.mark.seconds
def test_growing_cache_on_request(tmp_path):
    source = weightless.load("torch213_torchscript_qwen2_op17_float32")
    portable, _ = operated(source, tmp_path, cache="growing")
    assert counts(portable, FUSED) == {op: count for op, count in llama.items() if op != "TensorScatter"}
    assert largest_error(decode(source, alone=True), decode(portable, alone=True)) < 1e-4


AGAIN = ("torch213_torchscript_qwen2_op17_float32", "bloom-dynamo-18-float32", "whisper-dynamo-18-float32",
         "sam_vision-dynamo-18-float32", "phi3-torchscript-17-float32")  # fmt: skip


@pytest.mark.parametrize("name", AGAIN)
@pytest.mark.sample("torch213*", "whisper*")
@pytest.mark.seconds
def test_surgery_on_its_own_output_changes_nothing(name, tmp_path):
    once, _ = operated(weightless.load(name), tmp_path)
    twice, _ = operated(once, tmp_path)
    assert Counter(node.op_type for node in twice.graph.node) == Counter(node.op_type for node in once.graph.node)
    assert [value.name for value in twice.graph.input] == [value.name for value in once.graph.input]
    run = (
        (lambda model: decode(model, alone=False))
        if name != "sam_vision-dynamo-18-float32"
        else lambda model: {"": outputs(model)}
    )
    assert largest_error(run(once), run(twice)) == 0


# as torch exports each family today, which the committed graphs cannot show
FRESH = {
    "llama": llama, "qwen2": llama, "qwen3": qwen3, "phi3": llama, "gemma": gemma, "gpt2": gpt2, "opt": opt, "gptbigcode": gpt2,
    "gptneox": gpt2 | {"RotaryEmbedding": 4}, "gptj": gpt2 | {"LayerNormalization": 3, "RotaryEmbedding": 4},
    "bloom": gpt2 | {"LayerNormalization": 6}, "mpt": gpt2, "whisper": whisper, "sam_vision": sam,
}  # fmt: skip


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """The folder of all fresh exports, made once for all workers: most of the time goes into importing torch."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "fresh"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(weightless.__file__).parent)!r})\n"
        "import export, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        f"for family in {list(FRESH)}:\n"
        "    attention = 'eager' if family in ('bloom', 'mpt', 'gptj') else 'sdpa'\n"
        f"    export.export(family, 'torchscript', 17, 'float32', Path({str(folder)!r}) / f'{{family}}.onnx', attention)\n"
    )
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return folder


@pytest.mark.slow  # beside the committed graphs
@pytest.mark.parametrize("family", FRESH)
def test_fresh_export(family, fresh, tmp_path):
    source = onnx.load(fresh / f"{family}.onnx")
    portable, report = operated(source, tmp_path)
    assert counts(portable, FUSED) == FRESH[family]
    assert counts(portable, DECOMPOSED) == {}
    assert report.unfused == []
    assert error_between(source, portable) < 1e-4
