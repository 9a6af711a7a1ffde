"""Weights that a checkpoint holds in 4 or 8 bits stay so: its packed words become standard DequantizeLinear.

    x @ W^T  →  x @ DequantizeLinear(q [in, out], scales [groups, out], zeros [groups, out])
    x @ W^T  →  Gather(x, order) @ the same with inputs in the order of their groups              GPTQ's desc_act

Zeros in the middle of the range vanish, q being signed then. Others make q uint4; surgery writes that in TensorRT's form.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from suture.core.dtypes import of_torch
from suture.core.errors import UserError
from suture.models.checkpoint import Checkpoint
from suture.models.packed import REMEDY, PackedWeight, is_packed, load_packed

FILE = "packed.data"
ALIGNMENT = 64
OPSET, IR_VERSION = 21, 10  # the first with blocks and types of 4 bits; nothing else that export writes changed since its own
BLOCKS = (1, 16, 32, 64, 128, 256)


def write_packed(model: ir.Model, checkpoint: Checkpoint, dtype: str, folder: Path) -> int:
    """Gives each product whose weight is packed in the checkpoint a dequantised one, its data in `folder`. Returns the
    bytes written. Raises UserError where `dtype` cannot hold the scales, or a weight has no exact form."""
    graph, written = model.graph, 0
    for name in [name for name in graph.initializers if is_packed(checkpoint, name)]:
        value = graph.initializers[name]
        weight = load_packed(checkpoint, name)
        if weight.scales.dtype not in (torch.float32, getattr(torch, dtype)) and dtype != "float32":
            stored = str(weight.scales.dtype).removeprefix("torch.")
            raise UserError(
                checkpoint.folder, f"its scales are {stored}, which {dtype} rounds", f"export with --dtype {stored}"
            )
        order = torch.argsort(weight.group, stable=True)
        inputs = _constants(name, weight, order, getattr(torch, dtype), folder / FILE, checkpoint)
        for constant in inputs:
            graph.initializers.add(constant)
        attributes = {"axis": 0, "block_size": len(weight.q) // inputs[1].shape[0]}
        dequantise = ir.node("DequantizeLinear", inputs, attributes, name=f"{name}/dequantise")
        dequantise.outputs[0].name = f"{name}_dequantised"
        for transpose, _ in list(value.uses()):
            assert transpose.op_type == "Transpose", f"{name} is read by {transpose.op_type}"
            if dequantise.graph is None:
                graph.insert_before(transpose, dequantise)
            for product, index in list(transpose.outputs[0].uses()):
                product.replace_input_with(index, dequantise.outputs[0])
                if not torch.equal(order, torch.arange(len(order))):
                    _reorder(graph, product, order, name)
            graph.remove(transpose, safe=True)
        del graph.initializers[name]
        written = (folder / FILE).stat().st_size
    if written:
        model.opset_imports[""] = max(model.opset_imports[""], OPSET)
        model.ir_version = max(model.ir_version, IR_VERSION)
    return written


def _constants(
    name: str, weight: PackedWeight, order: torch.Tensor, dtype: torch.dtype, file: Path, checkpoint: Checkpoint
) -> list[ir.Value]:
    """q, scales and, where they are not in the middle of the range, zeros; inputs in the given order."""
    groups = weight.group[order].reshape(len(weight.scales), -1)
    if not torch.equal(groups, groups[:, :1].expand_as(groups)):
        raise UserError(checkpoint.folder, f"the groups of {name} differ in size", REMEDY)
    middle = 1 << (weight.bits - 1)
    parts = _parts(len(weight.q) // len(weight.scales))
    q, zeros, scales = weight.q[order], weight.zeros.repeat_interleave(parts, 0), weight.scales.repeat_interleave(parts, 0)
    symmetric = bool((zeros == middle).all())
    if weight.bits == 8 and not symmetric:
        raise UserError(
            checkpoint.folder, f"{name} has 8 bits with zeros off their middle, which TensorRT has no form for", REMEDY
        )
    scales = _external(
        f"{name}_scales", ir.DataType(of_torch(dtype).onnx), zeros.shape, scales.to(dtype).view(torch.uint8), file
    )
    if symmetric:
        kind = {4: ir.DataType.INT4, 8: ir.DataType.INT8}[weight.bits]
        return [_external(f"{name}_q", kind, q.shape, _bytes(q ^ middle, weight.bits), file), scales]
    parts = [(f"{name}_q", q), (f"{name}_zeros", zeros)]
    q, zeros = (_external(part, ir.DataType.UINT4, each.shape, _bytes(each, 4), file) for part, each in parts)
    return [q, scales, zeros]


def _parts(group_size: int) -> int:
    """How many blocks a group becomes, all with its scale: TensorRT and onnxruntime have kernels for 16 to 256."""
    if group_size <= BLOCKS[-1]:
        return 1
    return group_size // max(block for block in BLOCKS if group_size % block == 0)


def _bytes(values: torch.Tensor, bits: int) -> torch.Tensor:
    flat = values.reshape(-1)
    return flat if bits == 8 else flat[0::2] | (flat[1::2] << 4)


def _external(name: str, kind: ir.DataType, shape: tuple, data: torch.Tensor, file: Path) -> ir.Value:
    with open(file, "ab") as stream:
        stream.write(bytes(-stream.tell() % ALIGNMENT))
        offset = stream.tell()
        data.contiguous().numpy().tofile(stream)
        length = stream.tell() - offset
    tensor = ir.ExternalTensor(file.name, offset, length, kind, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=tensor)


def _reorder(graph: ir.Graph, product: ir.Node, order: torch.Tensor, name: str) -> None:
    indices = ir.tensor(order.numpy().astype(np.int64), name=f"{name}_order")
    constant = graph.initializers.get(indices.name) or ir.Value(
        name=indices.name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(order.shape), const_value=indices
    )
    graph.initializers.add(constant)
    gather = ir.node("Gather", [product.inputs[0], constant], {"axis": -1}, name=f"{name}/reorder")
    gather.outputs[0].name = f"{product.outputs[0].name}_ordered"
    graph.insert_before(product, gather)
    product.replace_input_with(0, gather.outputs[0])
