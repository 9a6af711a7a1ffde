"""What a random graph is drawn on: nodes, weights and inputs, in one float type, at one opset."""

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from suture.core.traits import MICROSOFT

OPSETS = (11, 13, 14, 17, 18, 20, 21, 23, 24)
SIZES = ({"B": 2, "S": 5, "P": 3}, {"B": 1, "S": 2, "P": 1})  # of open axes; the first of those that are fixed, too
ALIKE = {"B": 3, "S": 3, "P": 3}  # of axes of one name, which TensorRT takes for equal and refuses to run where they are not
TYPES = {"float": None, "positive": None, "int": TensorProto.INT64, "bool": TensorProto.BOOL, "int32": TensorProto.INT32,
         "mask": TensorProto.BOOL, "prefix": TensorProto.INT32, "tokens": TensorProto.INT64, "ones": TensorProto.INT64}  # fmt: skip
# what attributes are drawn from, beside the default that onnx.defs gives them
VALUES: dict[str, dict[str, tuple]] = {
    "Attention": {"scale": (0.25, 0.4), "is_causal": (0, 1), "softcap": (0.0, 1.5), "softmax_precision": (1, 10),
                  "qk_matmul_output_mode": (0, 1, 2, 3)},
    "Cast": {"saturate": (0, 1)},
    "Conv": {"auto_pad": ("NOTSET", "SAME_UPPER", "VALID"), "group": (1,), "strides": ([1, 1], [2, 2]), "dilations": ([1, 1],)},
    "Gelu": {"approximate": ("none", "tanh")},
    "Gemm": {"alpha": (1.0, 0.5), "beta": (1.0, 0.5, 0.0)},
    "LayerNormalization": {"epsilon": (1e-5, 0.1), "axis": (-1, 2, 1)},
    "RMSNormalization": {"epsilon": (1e-5, 0.1), "axis": (-1, 2, 1)},
    "RandomUniformLike": {"high": (1.0, 2.0)},
    "ReduceMean": {"keepdims": (0, 1), "noop_with_empty_axes": (0, 1)},
    "ReduceSum": {"keepdims": (0, 1), "noop_with_empty_axes": (0, 1)},
    "Reshape": {"allowzero": (0, 1)},
    "RotaryEmbedding": {"interleaved": (0, 1), "rotary_embedding_dim": (0, 4)},
    "ScatterElements": {"reduction": ("none", "add", "mul"), "axis": (0, 1, -1)},
    "ScatterND": {"reduction": ("none", "add", "max")},
    "Selu": {"alpha": (1.0,), "gamma": (2.0,)},
    "Shape": {"start": (0, 1, -2), "end": (1, 2, -1)},
    "Softmax": {"axis": (-1, 1, 0)},
    "Split": {},
    "Swish": {"alpha": (1.0, 1.702)},
    "Trilu": {"upper": (0, 1)},
    "TensorScatter": {"mode": ("linear", "circular"), "axis": (-2, 1, 2)},
}  # fmt: skip


@dataclass
class Input:
    shape: list[int | str]
    kind: str
    below: int = 2


@dataclass
class Canvas:
    """`family`: what the draw is of. `decoder`: whether it has caches, and is fed steps."""

    rng: np.random.Generator
    opset: int = 24
    dtype: int = TensorProto.FLOAT
    axes: str = "own"
    family: str = ""
    decoder: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: dict[str, Input] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)

    # --- chance -----------------------------------------------------------------------------------------------------------

    def chance(self, part: float = 0.5) -> bool:
        return bool(self.rng.random() < part)

    def pick(self, *values):
        return values[self.rng.integers(len(values))]

    def near(self, right, *wrong):
        """What a pass looks for, and now and then something else."""
        return right if self.chance(0.9) else self.pick(*wrong)

    # --- tensors ----------------------------------------------------------------------------------------------------------

    @property
    def numpy(self) -> np.dtype:
        return helper.tensor_dtype_to_np_dtype(self.dtype)

    def input(self, *shape: int | str, kind: str = "float", below: int = 2, name: str = "") -> str:
        name = name or f"in_{len(self.inputs)}"
        self.inputs[name] = Input(list(shape), kind, below)
        return name

    def weight(self, *shape: int, scale: float = 1.0, near: float = 0.0) -> str:
        """Normal numbers of this deviation around `near`."""
        return self.constant((self.rng.standard_normal(shape) * scale + near).astype(self.numpy))

    def number(self, value: float, rank: int = 0) -> str:
        return self.constant(np.full((1,) * rank, value, self.numpy))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def constant(self, values: np.ndarray) -> str:
        name = f"w_{len(self.weights)}"
        self.weights[name] = values
        return name

    def any(self, *shape: int | str, kind: str = "float") -> str:
        """An input, or a weight where all sizes are numbers."""
        if all(isinstance(size, int) for size in shape) and self.chance():
            values = self.rng.standard_normal(shape)
            values = {"positive": np.abs(values) + 0.2, "bool": values > 0}.get(kind, values)
            return self.constant(values.astype(bool if kind == "bool" else self.numpy))
        return self.input(*shape, kind=kind)

    # --- nodes ------------------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: str, domain: str = "", outputs: int | list[str] = 1, drawn: bool = False, **attributes):
        """A node; its output's name, or their names. `drawn`: its other attributes, as onnx.defs has them, are drawn."""
        names = outputs if isinstance(outputs, list) else [f"{kind.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
        given = {name: value for name, value in attributes.items() if value is not None}
        if drawn:
            given = self._drawn(kind) | given
        self.nodes.append(helper.make_node(kind, list(inputs), names, f"n{len(self.nodes)}", domain=domain, **given))
        return names[0] if len(names) == 1 else names

    def contrib(self, kind: str, *inputs: str, **attributes):
        return self.op(kind, *inputs, domain=MICROSOFT, **attributes)

    def _drawn(self, kind: str) -> dict:
        found = {}
        for name, attribute in onnx.defs.get_schema(kind, self.opset, "").attributes.items():
            values = list(VALUES.get(kind, {}).get(name, ()))
            if attribute.default_value.name:
                values.append(helper.get_attribute_value(attribute.default_value))
            if values and self.chance(0.4):
                found[name] = self.pick(*values)
        return found

    def axes_op(self, kind: str, x: str, axes: list[int] | None, **attributes) -> str:
        """Squeeze, Unsqueeze or a reduction, whose axes were an attribute once."""
        if axes is None:
            return self.op(kind, x, **attributes)
        since = 13 if kind in ("Squeeze", "Unsqueeze", "ReduceSum") else 18
        if self.opset < since:
            return self.op(kind, x, axes=axes, **attributes)
        return self.op(kind, x, self.ints(*axes), **attributes)

    def split(self, x: str, sizes: list[int], axis: int) -> list[str]:
        if self.opset < 13:
            return self.op("Split", x, outputs=len(sizes), split=sizes, axis=axis)
        if len(set(sizes)) == 1 and self.chance(0.3):
            return self.op("Split", x, outputs=len(sizes), axis=axis, num_outputs=len(sizes) if self.opset > 17 else None)
        return self.op("Split", x, self.ints(*sizes), outputs=len(sizes), axis=axis)

    def output(self, name: str, dtype: int | None = None) -> None:
        self.outputs[name] = self.dtype if dtype is None else dtype

    # --- what it becomes --------------------------------------------------------------------------------------------------

    def model(self) -> onnx.ModelProto:
        inputs = [
            helper.make_tensor_value_info(name, TYPES[each.kind] or self.dtype, [
                self._dim(f"{name}_{axis}", size) for axis, size in enumerate(each.shape)
            ])
            for name, each in self.inputs.items()
        ]  # fmt: skip
        outputs = [helper.make_tensor_value_info(name, dtype, None) for name, dtype in self.outputs.items()]
        weights = [numpy_helper.from_array(values, name) for name, values in self.weights.items()]
        graph = helper.make_graph(self.nodes, self.family, inputs, outputs, weights)
        opsets = [helper.make_opsetid("", self.opset)]
        if any(node.domain == MICROSOFT for node in self.nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10 if self.opset < 23 else 11)
        if self.axes != "unnamed":  # of those outputs are without a shape, too
            known = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.output}
            for value in model.graph.output:
                value.CopyFrom(known[value.name])
        return model

    def _dim(self, own: str, size: int | str) -> int | str | None:
        if isinstance(size, int) or self.axes == "fixed":
            return SIZES[0].get(size, size)
        return {"own": own, "letters": size, "one": "N", "unnamed": None}[self.axes]

    def feeds(self) -> list[dict[str, np.ndarray]]:
        """A set of inputs for each of SIZES; one where all axes are fixed, and one more of ALIKE where all have one name."""
        chosen = SIZES[:1] if self.axes == "fixed" else (*SIZES, ALIKE) if self.axes == "one" else SIZES
        return [{name: self._values(each, sizes) for name, each in self.inputs.items()} for sizes in chosen]

    def _values(self, each: Input, sizes: dict[str, int]) -> np.ndarray:
        shape = [sizes.get(size, size) for size in each.shape]
        if each.kind in ("int", "int32", "tokens"):
            values = self.rng.integers(0, each.below, shape)
        elif each.kind == "ones":
            values = np.ones(shape)
        elif each.kind == "prefix":  # each row's ones, then zeros
            values = np.arange(shape[-1]) < self.rng.integers(1, shape[-1] + 1, (*shape[:-1], 1))
        elif each.kind in ("bool", "mask"):
            values = self.rng.random(shape) < 0.6
            if each.kind == "mask":
                values[..., 0] = True  # each row sees something
        else:
            values = self.rng.standard_normal(shape)
            values = np.abs(values) + 0.2 if each.kind == "positive" else values
        return np.asarray(values).astype(helper.tensor_dtype_to_np_dtype(TYPES[each.kind] or self.dtype))
