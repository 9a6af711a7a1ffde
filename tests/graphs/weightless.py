"""Graphs without their weights, small enough to commit: every large float initializer becomes a mean and a deviation,
and gets values from a seed when it is loaded."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FOLDER = Path(__file__).parent
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
PACKED = "packed"
LARGE = 48  # elements; smaller ones may be tables, such as rotary frequencies


def save(model: onnx.ModelProto, name: str) -> None:
    """Writes graphs/NAME.onnx.gz."""
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOATS and np.prod(tensor.dims) > LARGE:
            values = numpy_helper.to_array(tensor).astype(np.float64)
            bare = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            bare.doc_string = f"{values.mean():.4g} {values.std():.4g}"
            tensor.CopyFrom(bare)
        elif tensor.data_type == TensorProto.UINT8:  # packed numbers of few bits
            tensor.CopyFrom(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, doc_string=PACKED))
    for node in model.graph.node:
        node.doc_string = ""
        scopes = [entry for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        node.metadata_props.extend(scopes)
    del model.functions[:], model.metadata_props[:]
    packed = gzip.compress(model.SerializeToString(deterministic=True), 9, mtime=0)
    (FOLDER / f"{name}.onnx.gz").write_bytes(packed)


def load(name: str) -> onnx.ModelProto:
    """graphs/NAME.onnx.gz with weights, the same each time."""
    model = onnx.load_model_from_string(gzip.decompress((FOLDER / f"{name}.onnx.gz").read_bytes()))
    for tensor in model.graph.initializer:
        if tensor.doc_string:
            random = np.random.default_rng(zlib.crc32(tensor.name.encode()))
            if tensor.doc_string == PACKED:
                values = random.integers(0, 256, list(tensor.dims))
            else:
                values = random.normal(*map(float, tensor.doc_string.split()), list(tensor.dims))
            values = values.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def names() -> list[str]:
    return sorted(path.name.removesuffix(".onnx.gz") for path in FOLDER.glob("*.onnx.gz"))


def filled(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph stored with references to weights that are left out, with values of the deviation that a product keeps."""
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            dims = list(tensor.dims)
            deviation = 1 / np.sqrt(np.prod(dims[1:]) if len(dims) == 4 else dims[0])
            values = np.random.default_rng(zlib.crc32(tensor.name.encode())).standard_normal(dims) * deviation
            values = values.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model
