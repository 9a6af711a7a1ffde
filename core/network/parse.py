"""Has TensorRT's parser read an ONNX file, in a child process (the parser can end its process by a signal), and
describes the network that it made.

Run as a program, this file is the child: `python -m suture.core.network.parse MODEL ROOT DESCRIPTOR`, with the graph on
standard input; the network goes into the open file.
"""

import ctypes
import importlib
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import onnx

from suture.core import child
from suture.core.command import end_with_parent
from suture.core.errors import UserError
from suture.core.network.description import Constant, Layer, Network, Packed, Reference, Tensor
from suture.core.weights import weights_root

LARGE = 1 << 20  # bytes from which a constant stays in the ONNX file instead of being copied between processes
BITS = {"BF16": 16, "FP8": 8, "E8M0": 8, "INT4": 4, "FP4": 4}  # of the dtypes that numpy lacks


def parse(model: Path, graph: onnx.ModelProto | None = None) -> Network:
    """The network of the ONNX file `model`, or of a `graph` over that file's weights. Raises NoTensorRT, or UserError if
    the parser refuses it, or dies of it."""
    data = model.read_bytes() if graph is None else graph.SerializeToString()
    with tempfile.TemporaryFile() as result:  # it has no name, so that nothing of it stays if this process is killed
        number = result.fileno()
        command = child.command("suture.core.network.parse", model, weights_root(model), number)
        done = subprocess.run(command, env=child.environment(), input=data, capture_output=True, pass_fds=[number])
        if done.returncode < 0:
            died = signal.Signals(-done.returncode).name
            raise UserError(model, f"TensorRT's parser died of {died} reading it", "take out the node that it cannot take")
        if done.returncode:
            last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise UserError(model, f"TensorRT's parser did not finish: {last}", "look whether tensorrt is installed")
        result.seek(0)
        parsed = pickle.load(result)  # written by the child above and by no one else
    if parsed is None:
        raise NO_TENSORRT
    if isinstance(parsed, str):
        raise UserError(model, f"TensorRT's parser refuses it: {parsed}", "rewrite that node, or leave it out")
    return parsed


class NoTensorRT(UserError):
    """It is not installed here, which says nothing of the graph."""


NO_TENSORRT = NoTensorRT("TensorRT", "is not installed", "pip install tensorrt-rtx")


class Refused(Exception):
    """The parser returned errors instead of a network."""


def describe(data: bytes, model: Path, root: Path) -> Network:
    """Parses serialized ONNX in this process. External weights are looked up in the folder `root`. Raises Refused."""
    trt = _tensorrt()
    warnings = _Warnings(trt)
    network = trt.Builder(warnings.logger).create_network(0)
    parser = trt.OnnxParser(network, warnings.logger)
    if not parser.parse(data, str(root / model.name)):
        raise Refused("; ".join(_error(parser.get_error(index)) for index in range(parser.num_errors)))
    messages = list(warnings.messages)  # not what the getters below will say about unset attributes
    walk = _Walk(trt)
    inputs = tuple(walk.tensor(network.get_input(index)) for index in range(network.num_inputs))
    layers = [walk.layer(network.get_layer(index)) for index in range(network.num_layers)]
    outputs = tuple(walk.tensor(network.get_output(index)) for index in range(network.num_outputs))
    version = f"{trt.__name__} {trt.__version__}"
    return Network(model, version, layers, walk.tensors, inputs, outputs, messages)


class _Walk:
    """Turns binding objects into plain data, and keeps each of them alive: as long as it is, the same tensor or
    conditional is the same Python object, so that `id` tells two of one name apart."""

    def __init__(self, trt):
        self.trt = trt
        self.alive: dict[int, tuple[object, str]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.classes = {_key(name): getattr(trt, name) for name in dir(trt) if re.fullmatch(r"I[A-Z]\w*Layer", name)}
        self.classes |= {f"conditional{end}": getattr(trt, f"IIfConditional{end.title()}Layer") for end in _ENDS}

    def tensor(self, tensor) -> str | None:
        if tensor is None:
            return None
        name = self._name(tensor, self.tensors)
        if name not in self.tensors:
            self.tensors[name] = Tensor(name, tensor.dtype.name, _shape(tensor.shape))
        return name

    def layer(self, layer) -> Layer:
        inputs = tuple(self.tensor(layer.get_input(index)) for index in range(layer.num_inputs))
        outputs = tuple(self.tensor(layer.get_output(index)) for index in range(layer.num_outputs))
        kind, name, node = layer.type.name, layer.name, _node(layer.metadata)
        own = self.classes.get(_key(kind))
        attributes = {}
        if own is not None:
            layer.__class__ = own  # the bindings hand out every layer as an ILayer
            attributes = {key: self.value(layer, key) for key in _properties(own, self.trt.ILayer)}
            if kind == "CONSTANT":  # not through `value`: its weights need the tensor's shape and name
                attributes["weights"] = _constant(layer, name, self.tensors[outputs[0]])
        return Layer(kind, name, node, inputs, outputs, attributes)

    def value(self, owner, key: str) -> object:
        """One attribute as plain data; None where it is not set (some getters raise then)."""
        trt = self.trt
        try:
            value = getattr(owner, key)
        except (RuntimeError, ValueError, TypeError):
            return None
        if isinstance(value, trt.ITensor):
            return self.tensor(value)
        if isinstance(value, trt.IAttention):
            return {name: self.value(value, name) for name in _properties(trt.IAttention, object)}
        if isinstance(value, trt.IIfConditional):
            return self._name(value, {name for kept, name in self.alive.values() if type(kept) is type(value)})
        if isinstance(value, (trt.Dims, trt.Permutation)):
            return _shape(value)
        if isinstance(value, trt.Weights):
            return _held(value)
        if isinstance(value, np.ndarray):  # a view of memory that goes with the parser
            return value.copy() if value.size else None
        return getattr(value, "name", value)

    def _name(self, item, taken) -> str:
        """The item's name, with a number behind it where another item has that name already."""
        if id(item) not in self.alive:
            names = [item.name, *(f"{item.name}#{number}" for number in range(2, len(taken) + 3))]
            self.alive[id(item)] = item, next(name for name in names if name not in taken)
        return self.alive[id(item)][1]


_ENDS = ("input", "output")


def _properties(own: type, base: type) -> list[str]:
    """What a class adds to `base`, by redefinition too: IActivationLayer.type hides ILayer.type."""
    added = [vars(parent) for parent in own.__mro__ if not issubclass(base, parent)]
    return [name for members in added for name, member in members.items() if isinstance(member, property)]


def _constant(layer, name: str, tensor: Tensor) -> Constant:
    """Small constants by value, large ones by reference: the parser names their layer for the ONNX tensor."""
    weights = layer.weights
    if isinstance(weights, np.ndarray):
        if weights.nbytes < LARGE:
            return weights.reshape(tensor.shape).copy()
        return Reference(name, tensor.dtype, tensor.shape, zlib.crc32(np.ascontiguousarray(weights).data.cast("B")))
    data = _bytes_of(weights)
    if data is None or len(data) >= LARGE:
        return Reference(name, tensor.dtype, tensor.shape, None if data is None else zlib.crc32(data))
    return Packed(tensor.dtype, tensor.shape, bytes(data))


def _held(weights) -> Packed | str | None:
    """Weights of a dtype that numpy lacks, inside a layer: their bytes, or what is to be said of them."""
    data = _bytes_of(weights) if weights.size else None
    if data is None:
        return f"{weights.dtype.name} weights without a view" if weights.size else None
    return Packed(weights.dtype.name, (weights.size,), bytes(data))


class _Weights(ctypes.Structure):
    """nvinfer1::Weights"""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def _bytes_of(weights) -> memoryview | None:
    """The bytes of weights whose dtype numpy lacks, for which the bindings have no other view than the C++ object that
    theirs wraps. None if it does not look like one."""
    wrapped = ctypes.cast(id(weights) + object.__basicsize__, ctypes.POINTER(ctypes.POINTER(_Weights)))[0][0]
    alike = (wrapped.type, wrapped.count) == (int(weights.dtype), weights.size) and wrapped.values
    if not alike or weights.dtype.name not in BITS:
        return None
    size = -(-weights.size * BITS[weights.dtype.name] // 8)
    return memoryview((ctypes.c_char * size).from_address(wrapped.values)).cast("B")


def _key(name: str) -> str:
    return re.sub(r"^I(?=[A-Z][\w]*Layer$)|Layer$|_", "", name).lower()


def _shape(dims) -> tuple[int, ...] | None:
    try:
        return tuple(dims)
    except ValueError:  # more dimensions than TensorRT has: its way of saying "not set"
        return None


def _node(metadata: str) -> str | None:
    """`[ONNX Layer: name | subgraph (then_branch) | name of the If]` -> name."""
    found = re.fullmatch(r"\[ONNX Layer: (.*?)( \| .*)?\]", metadata, re.DOTALL)
    return found[1] if found else None


def _error(error) -> str:
    where = error.node_name() or f"node {error.node()}"
    lines = [line for line in error.desc().strip().splitlines() if "catchCudaError" not in line]  # no driver: not news
    return f"{error.node_operator() or 'graph'} {where}: {' '.join(lines)}"


def _tensorrt():
    for name in ("tensorrt_rtx", "tensorrt"):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):  # OSError: the package is there, the libraries it loads are not
            continue
    raise NO_TENSORRT


class _Warnings:
    """A logger that keeps what the parser warns about."""

    def __init__(self, trt):
        messages: list[str] = []

        class Logger(trt.ILogger):
            def log(self, severity, message):
                if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    messages.append(message.strip())

        self.logger, self.messages = Logger(), messages


def main(model: str, root: str, descriptor: str) -> None:
    """Parses the graph on standard input."""
    end_with_parent()
    try:
        result: Network | str | None = describe(sys.stdin.buffer.read(), Path(model), Path(root))
    except Refused as refused:
        result = str(refused)
    except NoTensorRT:
        result = None
    with open(int(descriptor), "wb") as file:
        pickle.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
