"""Reads the network that TensorRT's parser made of an ONNX file into plain data. Runs in the parser's own process: see
parse.py."""

import ctypes
import functools
import importlib
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from suture.core.dtypes import BY_TENSORRT
from suture.core.errors import UserError
from suture.core.network.description import Constant, Layer, Network, Packed, Refusal, Tensor, WeightReference
from suture.core.network.layer_names import onnx_nodes

NO_IMPORTER = re.compile(
    r"plugin.*not found", re.IGNORECASE
)  # what TensorRT says where it has nothing for an operator, beside "false"
LARGE = 1 << 20  # bytes from which a constant stays in the ONNX file instead of being copied between processes


class NoTensorRT(UserError):
    """It is not installed here, which says nothing of the graph."""

    def __reduce__(self):
        return NoTensorRT, self.parts


NO_TENSORRT = NoTensorRT("TensorRT", "is not installed", "pip install tensorrt-rtx")


class Refused(Exception):
    """The parser returned errors instead of a network: `refusals` has all of them."""

    def __init__(self, refusals: list[Refusal]):
        super().__init__("; ".join(map(str, refusals)))
        self.refusals = refusals


def describe(data: bytes, model: Path, root: Path) -> Network:
    """Parses serialized ONNX in this process. External weights are looked up in the folder `root`. Raises Refused."""
    trt = _tensorrt()
    logger, said = _logger(trt)
    said.clear()
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(data, str(root / model.name)):
        raise Refused([_refusal(parser.get_error(index)) for index in range(parser.num_errors)])
    messages = list(said)  # not what the getters below will say about unset attributes
    return read_network(trt, network, model, messages)


def read_network(trt, network, model: Path, messages: Sequence[str] = (), checked: bool = True) -> Network:
    """The INetworkDefinition `network` that the parser of the module `trt` has made of the file `model`. `checked`: with the
    checksums of large constants, for which all of them are read."""
    walk = _Walk(trt, checked)
    inputs = tuple(walk.given(network.get_input(index)) for index in range(network.num_inputs))
    layers = [walk.layer(network.get_layer(index)) for index in range(network.num_layers)]
    outputs = tuple(walk.given(network.get_output(index)) for index in range(network.num_outputs))
    version = f"{trt.__name__} {trt.__version__}"
    return Network(model, version, layers, walk.tensors, inputs, outputs, list(messages))


class _Walk:
    """Turns binding objects into plain data, and keeps each of them alive: as long as it is, the same tensor or
    conditional is the same Python object, so that `id` tells two of one name apart."""

    def __init__(self, trt, checked: bool):
        self.trt, self.checked = trt, checked
        self.alive: dict[int, tuple[object, str]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.classes = {_key(name): getattr(trt, name) for name in dir(trt) if re.fullmatch(r"I[A-Z]\w*Layer", name)}
        self.classes |= {f"conditional{end}": getattr(trt, f"IIfConditional{end.title()}Layer") for end in _ENDS}

    def tensor(self, tensor) -> str | None:
        return None if tensor is None else self.given(tensor)

    def given(self, tensor) -> str:
        name = self._name(tensor, self.tensors)
        if name not in self.tensors:
            self.tensors[name] = Tensor(name, tensor.dtype.name, tuple(tensor.shape))
        return name

    def layer(self, layer) -> Layer:
        inputs = tuple(self.tensor(layer.get_input(index)) for index in range(layer.num_inputs))
        outputs = tuple(self.given(layer.get_output(index)) for index in range(layer.num_outputs))
        kind, name, node = layer.type.name, layer.name, next(iter(onnx_nodes(layer.metadata)), None)
        own = self.classes.get(_key(kind))
        attributes = {}
        if own is not None:
            layer.__class__ = own  # the bindings hand out every layer as an ILayer
            attributes = {key: self.value(layer, key) for key in _properties(own, self.trt.ILayer)}
            if kind == "CONSTANT":  # not through `value`: its weights need the tensor's shape and name
                attributes["weights"] = _constant(layer, name, self.tensors[outputs[0]], self.checked)
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
        if isinstance(value, (trt.IIfConditional, trt.ILoop)):
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


def _constant(layer, name: str, tensor: Tensor, checked: bool) -> Constant:
    """Small constants by value, large ones by reference: the parser names their layer for the ONNX tensor."""
    weights = layer.weights
    if isinstance(weights, np.ndarray):
        if weights.nbytes < LARGE:
            return weights.reshape(tensor.shape).copy()
        checksum = zlib.crc32(np.ascontiguousarray(weights).data.cast("B")) if checked else None
        return WeightReference(name, tensor.dtype, tensor.shape, checksum)
    data = _bytes_of(weights)
    if data is None or len(data) >= LARGE:
        return WeightReference(name, tensor.dtype, tensor.shape, zlib.crc32(data) if data is not None and checked else None)
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
    if not alike or weights.dtype.name not in BY_TENSORRT:
        return None
    size = -(-weights.size * BY_TENSORRT[weights.dtype.name].bits // 8)
    return memoryview((ctypes.c_char * size).from_address(wrapped.values)).cast("B")


def _key(name: str) -> str:
    return re.sub(r"^I(?=[A-Z][\w]*Layer$)|Layer$|_", "", name).lower()


def _shape(dims) -> tuple[int, ...] | None:
    try:
        return tuple(dims)
    except ValueError:  # more dimensions than TensorRT has: its way of saying "not set"
        return None


def _refusal(error) -> Refusal:
    lines = [line for line in error.desc().strip().splitlines() if "catchCudaError" not in line]  # no driver: not news
    operator = error.node_operator() or ""
    message = re.sub(r"^Invalid Node - \S+\s*", "", " ".join(lines))
    message = re.sub(r"\s*In (operator\(\)|\w+) at /\S+", "", message)  # a place in TensorRT's own sources
    if message in ("false", "") or NO_IMPORTER.search(message):  # it then looks for a plugin of the operator's name
        message = f"TensorRT has no operator {operator}, and no plugin of that name"
    checked = "Checkers" in error.file()  # which looks at every node; what imports them ends at the first that it cannot take
    return Refusal(error.node_name() or f"node {error.node()}", operator, message, stopped=not checked)


def _tensorrt():
    for name in ("tensorrt_rtx", "tensorrt"):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):  # OSError: the package is there, the libraries it loads are not
            continue
    raise NO_TENSORRT


@functools.cache
def _logger(trt) -> tuple[object, list[str]]:
    """A logger, and the list of what it heard. One a process: TensorRT keeps the first that it is given."""
    messages: list[str] = []

    class Logger(trt.ILogger):
        def log(self, severity, message):
            if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message.strip())

    return Logger(), messages


def load_plugins(library: str) -> str | None:
    """Registers a plugin library's creators with TensorRT in this process. Returns what is wrong, None if nothing is."""
    trt = _tensorrt()
    logger, said = _logger(trt)
    said.clear()
    registry = trt.Builder(logger).get_plugin_registry()
    before = len(registry.all_creators)
    if not hasattr(registry, "load_library"):
        return f"{trt.__name__} {trt.__version__} loads no plugin libraries"
    registry.load_library(library)
    if len(registry.all_creators) > before:
        return None
    errors = [line for line in said if "catchCudaError" not in line]
    return re.sub(r"^.*?\((?=Unable|Symbol)|( In \w+ at .*)", "", errors[0]) if errors else "it registers no plugin"
