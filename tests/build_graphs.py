"""Small lowered decoders, made by hand in the form that surgery writes, for the tests of build/.

Hidden 128, 4 heads of 32, one or two layers, static cache of 64 slots, opset 24.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from suture.build import flavour
from suture.build.profiles import make_profiles
from suture.build.stage import with_roles
from suture.core.signature import find_signature

HIDDEN, HEADS, HEAD_DIM, FFN, VOCABULARY, CAPACITY = 128, 4, 32, 256, 512, 64
DTYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "bfloat16": TensorProto.BFLOAT16}


class GraphBuilder:
    """Nodes and weights in the order they are added; every method returns the name of what it made."""

    def __init__(self, dtype: str):
        self.dtype = DTYPES[dtype]
        self.nodes, self.initializers = [], []
        self.random = np.random.default_rng(0)

    def op(self, kind: str, *inputs: str, outputs: int = 1, name: str | None = None, **attributes):
        name = name or f"{kind}_{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array, dtype: int | None = None) -> str:
        name = f"constant_{len(self.initializers)}"
        array = np.asarray(array)
        if dtype is None:
            tensor = numpy_helper.from_array(array, name)
        else:
            tensor = helper.make_tensor(name, dtype, array.shape, array.flatten().tolist())
        self.initializers.append(tensor)
        return name

    def weight(self, name: str, *shape: int) -> str:
        values = self.random.standard_normal(shape) * 0.05 if len(shape) > 1 else np.ones(shape)
        numpy_dtype = helper.tensor_dtype_to_np_dtype(self.dtype)
        self.initializers.append(numpy_helper.from_array(values.astype(numpy_dtype), name))
        return name


def decoder(dtype: str = "float16", layers: int = 1, attention: str = "TRT_Attention") -> onnx.ModelProto:
    """A lowered decoder. `attention`: TRT_Attention with an additive mask, or what TensorRT's parser gets wrong:
    "causal" for ONNX Attention with is_causal, "nonpad" for the same with nonpad_kv_seqlen too."""
    graph = GraphBuilder(dtype)
    flat = graph.constant(np.array([-1, HIDDEN]))
    sequence = graph.op("Shape", "input_ids", start=1, end=2)
    batch_sequence = graph.op("Shape", "input_ids")
    mask = _mask(graph, sequence) if attention == "TRT_Attention" else None
    lengths = graph.op("Add", "write_indices", graph.op("Squeeze", sequence)) if attention == "nonpad" else ""
    inverse = 1.0 / (10000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    angles = np.arange(CAPACITY)[:, None] * inverse
    cos, sin = graph.constant(np.cos(angles), graph.dtype), graph.constant(np.sin(angles), graph.dtype)

    hidden = graph.op("Gather", graph.weight("embed.weight", VOCABULARY, HIDDEN), "input_ids")
    for layer in range(layers):
        normed = graph.op("RMSNormalization", hidden, graph.weight(f"{layer}.norm1.weight", HIDDEN), epsilon=1e-6)
        rows = graph.op("Reshape", normed, flat)
        heads = graph.op("Concat", batch_sequence, graph.constant(np.array([HEADS, HEAD_DIM])), axis=0)
        qkv = []
        for part in "qkv":
            weight = graph.weight(f"{layer}.{part}.weight", HIDDEN, HIDDEN)
            split = graph.op("Reshape", graph.op("Gemm", rows, weight, transB=1), heads)
            qkv.append(graph.op("Transpose", split, perm=[0, 2, 1, 3]))
        query, key = (graph.op("RotaryEmbedding", part, cos, sin, "position_ids") for part in qkv[:2])
        key, value = (
            graph.op("TensorScatter", f"past_key_values.{layer}.{role}", new, "write_indices",
                     name=f"present.{layer}.{role}", axis=-2, mode="linear")
            for role, new in (("key", key), ("value", qkv[2]))
        )  # fmt: skip
        if attention == "TRT_Attention":
            scaled = graph.op("Mul", query, graph.constant(HEAD_DIM**-0.5, graph.dtype))
            options = {"TRT_decomposable": 1} if dtype == "float32" else {}
            mixed = graph.op("TRT_Attention", scaled, key, value, mask, name=f"attention_{layer}", **options)
        else:
            mixed = graph.op("Attention", query, key, value, "", "", "", lengths, name=f"attention_{layer}", is_causal=1)
        merged = graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), flat)
        projected = graph.op("Gemm", merged, graph.weight(f"{layer}.o.weight", HIDDEN, HIDDEN), transB=1)
        hidden = graph.op("Add", hidden, graph.op("Reshape", projected, graph.op("Shape", hidden)))
        normed = graph.op("RMSNormalization", hidden, graph.weight(f"{layer}.norm2.weight", HIDDEN), epsilon=1e-6)
        rows = graph.op("Reshape", normed, flat)
        gate = graph.op("Gemm", rows, graph.weight(f"{layer}.gate.weight", FFN, HIDDEN), transB=1)
        up = graph.op("Gemm", rows, graph.weight(f"{layer}.up.weight", FFN, HIDDEN), transB=1)
        product = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
        down = graph.op("Gemm", product, graph.weight(f"{layer}.down.weight", HIDDEN, FFN), transB=1)
        hidden = graph.op("Add", hidden, graph.op("Reshape", down, graph.op("Shape", hidden)))
    normed = graph.op("RMSNormalization", hidden, graph.weight("norm.weight", HIDDEN), epsilon=1e-6)
    head = graph.op("Transpose", graph.weight("head.weight", VOCABULARY, HIDDEN), perm=[1, 0])
    graph.op("MatMul", normed, head, name="logits")

    cache = ["batch", HEADS, CAPACITY, HEAD_DIM]
    names = [f"{layer}.{role}" for layer in range(layers) for role in ("key", "value")]
    inputs = [_int64("input_ids", "batch", "sequence"), _int64("position_ids", "batch", "sequence")]
    inputs += [_int64("write_indices", "batch")]
    inputs += [helper.make_tensor_value_info(f"past_key_values.{name}", graph.dtype, cache) for name in names]
    outputs = [helper.make_tensor_value_info("logits", graph.dtype, ["batch", "sequence", VOCABULARY])]
    outputs += [helper.make_tensor_value_info(f"present.{name}", graph.dtype, cache) for name in names]
    return model(graph.nodes, inputs, outputs, graph.initializers)


def portable_decoder() -> onnx.ModelProto:
    """The float32 decoder with ONNX's own Attention, which onnxruntime runs."""
    return decoder("float32", attention="nonpad")


def describe(proto: onnx.ModelProto) -> dict:
    """What build's engine.json says of an engine of `proto`, as far as running it goes."""
    signature = find_signature(proto)
    profiles = make_profiles(proto, signature, split=True, batch=4, prompt=None, past=64)

    def tensors(values) -> list[dict]:
        dtypes = {7: "int64", 1: "float32"}
        return [
            {"name": value.name, "dtype": dtypes[value.type.tensor_type.elem_type],
             "shape": [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]}
            for value in values
        ]  # fmt: skip

    return {
        "tensorrt": {"flavour": "rtx", "version": flavour.load("rtx").__version__},
        "compute_capabilities": ["8.9"],
        "signature": asdict(signature),
        "inputs": with_roles(tensors(proto.graph.input), signature, frozenset()),
        "outputs": with_roles(tensors(proto.graph.output), signature, frozenset()),
        "profiles": [asdict(profile) for profile in profiles],
        "weights": {"mode": "constant", "constant_bytes": 0, "root": ".", "inputs": []},
    }


def _mask(graph: GraphBuilder, sequence: str) -> str:
    """[B,1,S,L]: 0 where slot <= write_indices + i, else -10000."""
    zero, one = graph.constant(np.array(0)), graph.constant(np.array(1))
    rows = graph.op("Range", zero, graph.op("Squeeze", sequence), one)  # [S]
    first = graph.op("Unsqueeze", "write_indices", graph.constant(np.array([1, 2, 3])))  # [B,1,1,1]
    last = graph.op("Add", first, graph.op("Unsqueeze", rows, graph.constant(np.array([0, 1, 3]))))  # [B,1,S,1]
    slots = graph.constant(np.arange(CAPACITY).reshape(1, 1, 1, CAPACITY))
    seen = graph.op("LessOrEqual", slots, last)
    return graph.op("Where", seen, graph.constant(0.0, graph.dtype), graph.constant(-10000.0, graph.dtype))


def model(nodes, inputs, outputs, initializers=()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "test", inputs, outputs, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def by_reference(proto: onnx.ModelProto, folder: Path, root: Path) -> Path:
    """Saves `proto` as folder/model.trt.onnx, its matrices in root/model.safetensors, as a manifest beside it says."""
    from safetensors.numpy import save_file  # here, so that graphs need no safetensors

    folder.mkdir(parents=True)
    root.mkdir(parents=True)
    weights = [tensor for tensor in proto.graph.initializer if tensor.name.endswith(".weight")]
    save_file({tensor.name: numpy_helper.to_array(tensor) for tensor in weights}, root / "model.safetensors")
    with open(root / "model.safetensors", "rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_length))
    for tensor in weights:
        start, end = header[tensor.name]["data_offsets"]
        onnx.external_data_helper.set_external_data(
            tensor, "model.safetensors", offset=8 + header_length + start, length=end - start
        )
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    onnx.save(proto, folder / "model.trt.onnx")
    (folder / "manifest.json").write_text(json.dumps({"outputs": {"model.trt.onnx": 0}, "weights_root": str(root)}))
    return folder / "model.trt.onnx"


def _int64(name: str, *shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, list(shape))
