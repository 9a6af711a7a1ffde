"""Made-up steps of a decoder, fed to a graph by what its inputs are for, and its outputs read back the same way.

So graphs that compute the same compare, whether their caches grow or are static and whatever their inputs are called:
caches slot by slot where they are valid, logits where tokens are. A graph without caches is fed by its inputs' names, and
each output is read whole.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from suture.core.as_written import at_full_accuracy
from suture.core.cpm_inputs import made_up
from suture.core.dtypes import HALVES
from suture.core.network.inputs import Feeds
from suture.core.sessions import NotLoaded, new_session, run_arrays
from suture.core.shadow_copy import ONLY_BFLOAT16, float32_shadow_copy, has_types
from suture.core.signature import LOGITS, Cache, Signature
from suture.core.step_inputs import mask_values, positions_of, step_values, valid_slots
from suture.core.tensors import references, tensor_bytes

ANY_SIZE = 5  # of an axis that nothing says anything about
ANY_VOCABULARY = 8
HEAVY = 200_000_000  # bytes of weights of which onnxruntime is to make no copies
ALPHAS = (1.0, 3.0)  # two scales of dynamic NTK, row by row
NO_ALPHAS = (1.0, 1.0)  # those of rows that do not outgrow the trained length
LAST = "logits of each row's last token"
LENGTHS = 5  # kv_lengths among the inputs of TRT_Attention; Attention's nonpad_kv_seqlen comes one later


class Unrunnable(Exception):
    """onnxruntime cannot run the graph on a step: says why."""


@dataclass(frozen=True)
class Step:
    """Row b has `lengths[b]` cached tokens and adds `counts[b]`, padded on the right to the longest row's."""

    name: str
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    row_of: tuple["Step", int] | None = None  # the step that this is one row of, and which

    @property
    def rows(self) -> list["Step"]:
        """Each row as a step without padding, of the same tokens after the same cache."""
        return [replace(self, lengths=self.lengths[row : row + 1], counts=self.counts[row : row + 1], row_of=(self, row))
                for row in range(len(self.counts))]  # fmt: skip

    @property
    def cached(self) -> int:
        return max(self.lengths)

    @property
    def new(self) -> int:
        return max(self.counts)

    @property
    def even(self) -> bool:
        """True if no row has padding."""
        return len(set(self.lengths)) == len(set(self.counts)) == 1

    @property
    def valid(self) -> np.ndarray:
        """bool [B, cached + new]: the slots of a growing cache that hold tokens."""
        return valid_slots(np.array(self.lengths), np.array(self.counts), self.cached, self.new)

    @property
    def positions(self) -> np.ndarray:
        """int64 [B, new]."""
        return positions_of(np.array(self.lengths), np.array(self.counts), self.new)


STEPS = (
    Step("prompt", (0, 0), (7, 7)),
    Step("one token", (0, 0), (1, 1)),
    Step("decoding", (6, 6), (1, 1)),
    Step("padded prompt", (0, 0), (7, 4)),
    Step("rows of different lengths", (6, 3), (3, 1)),
    Step("one row's second prompt", (3,), (4,)),
)


class Steps:
    """The inputs and outputs of a graph with this signature. `feeds` and `select` take a step, or, of a graph without caches,
    values by input."""

    def __init__(self, model: onnx.ModelProto, signature: Signature, alphas: tuple[float, ...] = ALPHAS, seed: int = 0):
        self.signature, self.alphas, self.seed = signature, alphas, seed
        self.contrib = any(node.op_type == "GroupQueryAttention" for node in model.graph.node)
        self.inputs = {value.name: value.type.tensor_type for value in model.graph.input}
        for tensor in model.graph.initializer:
            self.inputs.pop(tensor.name, None)
        self.capacity = signature.capacity if signature.static else self._scattered(model)
        self.vocabulary = signature.vocabulary or ANY_VOCABULARY

    def _scattered(self, model: onnx.ModelProto) -> int | None:
        """The slots of a cache that stays as long as it comes in, though nothing is called write_indices: a number says where
        a step is written."""
        if not self.signature.caches:
            return None
        cache = self.signature.caches[0]
        ends = {value.name: value.type.tensor_type for value in model.graph.output}
        slots = [_sizes(tensor)[2:3] for tensor in (self.inputs[cache.past], ends[cache.present])]
        return slots[0][0] if slots[0] == slots[1] and slots[0] and isinstance(slots[0][0], int) else None

    def all_fitting(self) -> list[Step]:
        """STEPS as far as the graph's sizes allow them, or else some that are made for these."""
        return [step for step in STEPS if self.fits(step)] or [step for step in self._own_steps() if self.fits(step)]

    def fits(self, step: Step) -> bool:
        """Whether the graph's own sizes allow the step."""
        signature = self.signature
        if signature.tokens is None:
            return step is STEPS[0]
        if step.cached and not (signature.caches or signature.encoder_caches):
            return False
        rows, columns = _sizes(self.inputs[signature.tokens])[:2]
        fixed = [(rows, len(step.counts)), (columns, step.new)]
        if signature.caches and self.capacity is None:
            fixed.append((_sizes(self.inputs[signature.caches[0].past])[2], step.cached))
        if any(isinstance(size, int) and size != wanted for size, wanted in fixed) or (self.contrib and not self._takes(step)):
            return False
        if self.capacity is not None and step.cached + step.new > self.capacity:
            return False
        return step.even or signature.static or (signature.mask is not None and self.capacity is None)

    def _takes(self, step: Step) -> bool:
        """GroupQueryAttention writes a row's tokens right after its valid ones, where Concat writes after padding; over a
        static cache onnxruntime's takes several tokens a step for one row only."""
        return (step.new == 1 or len(step.counts) == 1) if self.signature.static else step.even

    def select(self, step: Step | Feeds, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Of the outputs those that count, by what they are: logits [valid tokens, vocab], caches [valid slots, heads,
        head_dim]."""
        if isinstance(step, Feeds):
            return outputs
        signature, read = self.signature, {}
        found: dict[str | None, np.ndarray] = {name: values for name, values in outputs.items()}  # noqa: C416
        if signature.logits is not None and signature.tokens is not None:
            logits = found.pop(signature.logits)
            new = step.valid[:, step.cached :]
            if not signature.last_only and logits.shape[:2] == new.shape:
                read[LOGITS] = logits[new]
                read[LAST] = np.stack([row[count - 1] for row, count in zip(logits, step.counts)])
            elif logits.ndim == 3 and logits.shape[1] == 1:
                read[LAST] = logits[:, 0]
            else:
                read[LOGITS] = logits  # a class of the whole, say, of which all count
        for cache in signature.caches:
            read[f"{cache.role} cache of layer {cache.layer}"] = self._valid(found.pop(cache.present), step)
        for cache in signature.encoder_caches:
            found.pop(cache.present, None)
        return read | {name: values for name, values in found.items() if name is not None}

    def _valid(self, present: np.ndarray, step: Step) -> np.ndarray:
        slots = present.swapaxes(1, 2)
        if self.capacity is not None:
            totals = zip(step.lengths, step.counts)
            return np.concatenate([row[: length + count] for row, (length, count) in zip(slots, totals)])
        return slots[step.valid] if slots.shape[:2] == step.valid.shape else slots

    def feeds(self, step: Step | Feeds) -> dict[str, np.ndarray]:
        """By input, in the types that the graph declares."""
        types = {name: helper.tensor_dtype_to_np_dtype(tensor.elem_type) for name, tensor in self.inputs.items()}
        if isinstance(step, Feeds):
            return {name: step.values[name].astype(dtype, copy=False) for name, dtype in types.items()}
        names = replace(self.signature, capacity=self.capacity)
        whole, row = step.row_of or (step, None)
        own = slice(None) if row is None else slice(row, row + 1)
        tokens = self._random("tokens", whole.positions.shape, self.vocabulary)[own, : step.new]
        lengths, counts = np.array(step.lengths), np.array(step.counts)
        known = step_values(names, tokens, step.positions, np.array(self.alphas[: len(whole.counts)])[own], lengths, counts)
        known |= {name: values[own] for name, values in made_up(names.layout, len(whole.counts), self._slots(step)).items()}
        known |= {cache.past: self._past(cache, whole, step.cached)[own] for cache in names.caches}
        known |= {cache.past: self._past(cache, whole, None)[own] for cache in names.encoder_caches}
        if names.mask is not None and names.mask in self.inputs:
            known[names.mask] = mask_values(self.inputs[names.mask], names, lengths, counts)
        symbols: dict[int | str, int] = {}
        for name, given in known.items():
            if name in self.inputs:
                symbols |= dict(zip(_sizes(self.inputs[name]), given.shape))
        feeds = {}
        for name, tensor in self.inputs.items():
            values: object = known.get(name)
            if values is None and self.capacity is not None and types[name].kind == "i" and len(_sizes(tensor)) < 2:
                values = step.cached + np.arange(step.new) if _sizes(tensor) else step.cached  # where a step is written
            if values is None:
                shape = [size if isinstance(size, int) else symbols.get(size, ANY_SIZE) for size in _sizes(tensor)]
                values = self._random(name, shape, None if _is_float(tensor.elem_type) else 2)
            feeds[name] = np.asarray(values).astype(types[name], copy=False)
        return feeds

    def _own_steps(self) -> Iterator[Step]:
        """For graphs of fixed sizes: a prompt, and tokens after what the cache can hold besides."""
        if self.signature.tokens is None or not self.signature.caches:
            return
        rows, new = _sizes(self.inputs[self.signature.tokens])[:2]
        slots = _sizes(self.inputs[self.signature.caches[0].past])[2]
        rows, new = (size if isinstance(size, int) else 1 for size in (rows, new))
        if self.capacity is not None:
            yield Step("prompt", (0,) * rows, (new,) * rows)
            yield Step("decoding", (max(self.capacity - new, 0),) * rows, (new,) * rows)
        else:
            cached = slots if isinstance(slots, int) else 0
            yield Step("tokens of its own sizes", (cached,) * rows, (new,) * rows)

    def _slots(self, step: Step) -> int:
        return step.cached + step.new if self.capacity is None else self.capacity

    def _past(self, cache: Cache, step: Step, cached: int | None) -> np.ndarray:
        """[B, heads, slots, head_dim], of which a growing cache has `cached`; None: an encoder's, as it is declared."""
        _, heads, slots, head_dim = _sizes(self.inputs[cache.past])
        head_dim = head_dim if isinstance(head_dim, int) else self.signature.head_dim
        if not isinstance(heads, int) or head_dim < 1:
            raise Unrunnable(f"heads or width of {cache.past} are not written in the graph")
        key, rows = f"{cache.layer}.{cache.role}", len(step.counts)
        if cached is None:
            return self._random(key, (rows, heads, slots if isinstance(slots, int) else ANY_SIZE, head_dim))
        past = self._random(key, (rows, heads, step.cached, head_dim))
        if self.capacity is None:
            return past[:, :, :cached]
        return np.concatenate(
            [past, self._random(f"beyond {key}", (rows, heads, self.capacity - step.cached, head_dim))], axis=2
        )

    def _random(self, key: str, shape: tuple[int, ...] | list[int], below: int | None = None) -> np.ndarray:
        """The same numbers for the same key and seed: normal ones, or integers below a bound."""
        random = np.random.default_rng(zlib.crc32(key.encode(), self.seed))
        return random.standard_normal(shape, np.float32) if below is None else random.integers(0, below, shape)


class Runner(Steps):
    """A graph in onnxruntime, as it is written: bfloat16 as float32, quantised weights at full accuracy, TensorRT's
    attention as the standard one that it stands for. `wide`: all 16-bit floats as float32. `extra`: more tensors to give."""

    def __init__(
        self,
        model: onnx.ModelProto,
        signature: Signature,
        root: Path,
        extra: tuple[str, ...] = (),
        alphas: tuple[float, ...] = ALPHAS,
        wide: bool = False,
        seed: int = 0,
    ):
        self.declared = Steps(model, signature, alphas, seed)
        types = HALVES if wide else ONLY_BFLOAT16
        model = _standard(float32_shadow_copy(model, types) if has_types(model, types) else model)
        super().__init__(model, signature, alphas)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
        heavy = sum(tensor_bytes(tensor) for tensor, _ in references(model)) > HEAVY
        try:  # without folding, which would keep weights as float32
            self.session = new_session(model, root, mapped=heavy, without=["ConstantFolding"] * heavy)
        except NotLoaded as error:
            raise Unrunnable(f"onnxruntime cannot load the graph ({_brief(error)})") from None
        self.outputs = [value.name for value in self.session.get_outputs()]

    def feeds(self, step: Step | Feeds) -> dict[str, np.ndarray]:
        """The values that the graph itself can hold, whatever computes them."""
        types = {name: helper.tensor_dtype_to_np_dtype(tensor.elem_type) for name, tensor in self.inputs.items()}
        return {name: values.astype(types[name], copy=False) for name, values in self.declared.feeds(step).items()}

    def run(self, step: Step | Feeds) -> dict[str, np.ndarray]:
        """Every output by the graph's name for it."""
        try:
            return dict(zip(self.outputs, run_arrays(self.session, self.outputs, self.feeds(step))))
        except Unrunnable:
            raise
        except Exception as error:
            raise Unrunnable(f"onnxruntime cannot run the step {step.name} ({_brief(error)})") from None

    def read(self, step: Step | Feeds) -> dict[str, np.ndarray]:
        """What counts of a run."""
        return self.select(step, self.run(step))


def _standard(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in ops that onnxruntime computes, at full accuracy."""
    copy = at_full_accuracy(model)
    for node in copy.graph.node:
        if node.op_type == "TRT_Attention":
            node.op_type = "Attention"
            node.ClearField("attribute")
            node.attribute.append(helper.make_attribute("scale", 1.0))
            if len(node.input) > LENGTHS:
                node.input.insert(LENGTHS, "")
                node.attribute.append(helper.make_attribute("is_causal", 1))
        elif node.op_type.startswith("TRT_"):
            raise Unrunnable(f"onnxruntime has no {node.op_type}")
    return copy


def _sizes(tensor: onnx.TypeProto.Tensor) -> list[int | str]:
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]


def _is_float(elem_type: int) -> bool:
    return elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def _brief(error: Exception) -> str:
    return str(error).strip().splitlines()[0].split(" was false.")[-1].strip()[-200:]
