"""Made-up steps of a decoder, fed to a graph by what its inputs are for, and its outputs read back the same way.

So graphs that compute the same compare, whether their caches grow or are static and whatever their inputs are called:
caches slot by slot where they are valid, logits where tokens are.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from suture.core.as_written import at_full_accuracy
from suture.core.cpm_inputs import made_up
from suture.core.sessions import NotLoaded, new_session
from suture.core.shadow_copy import runnable
from suture.core.signature import LOGITS, Cache, Signature
from suture.core.step_inputs import mask_values, positions_of, step_values, valid_slots

ANY_SIZE = 5  # of an axis that nothing says anything about
ANY_VOCABULARY = 8
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
    Step("decoding", (6, 6), (1, 1)),
    Step("padded prompt", (0, 0), (7, 4)),
    Step("rows of different lengths", (6, 3), (3, 1)),
    Step("one row's second prompt", (3,), (4,)),
)


class Runner:
    """A graph in onnxruntime, as it is written: bfloat16 as float32, quantised weights at full accuracy, TensorRT's
    attention as the standard one that it stands for."""

    def __init__(
        self,
        model: onnx.ModelProto,
        signature: Signature,
        root: Path,
        extra: tuple[str, ...] = (),
        alphas: tuple[float, ...] = ALPHAS,
    ):
        model = _standard(model)
        self.alphas = alphas
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
        self.signature = signature
        self.inputs = {value.name: value.type.tensor_type for value in model.graph.input}
        for tensor in model.graph.initializer:
            self.inputs.pop(tensor.name, None)
        try:
            self.session = new_session(model, root, mapped=True)
        except NotLoaded as error:
            raise Unrunnable(f"onnxruntime cannot load the graph ({_brief(error)})") from None
        self.outputs = [value.name for value in self.session.get_outputs()]
        logits = next((value.shape[-1] for value in self.session.get_outputs() if value.name == signature.logits), None)
        self.vocabulary = logits if isinstance(logits, int) else ANY_VOCABULARY

    def fits(self, step: Step) -> bool:
        """Whether the graph's own sizes allow the step."""
        signature = self.signature
        if signature.tokens is None:
            return step is STEPS[0]
        if step.cached and not (signature.caches or signature.encoder_caches):
            return False
        rows, columns = _sizes(self.inputs[signature.tokens])[:2]
        fixed = [(rows, len(step.counts)), (columns, step.new)]
        return all(not isinstance(size, int) or size == wanted for size, wanted in fixed) and (
            step.cached + step.new <= signature.capacity if signature.static else step.even or signature.mask is not None
        )

    def run(self, step: Step) -> dict[str, np.ndarray]:
        """Every output by the graph's name for it."""
        try:
            return dict(zip(self.outputs, self.session.run(None, self._feeds(step))))
        except Unrunnable:
            raise
        except Exception as error:
            raise Unrunnable(f"onnxruntime cannot run the step {step.name} ({_brief(error)})") from None

    def read(self, step: Step) -> dict[str, np.ndarray]:
        """The outputs that count, by what they are: logits [valid tokens, vocab], caches [valid slots, heads, head_dim]."""
        found = self.run(step)
        signature = self.signature
        read = {}
        if signature.logits is not None:
            logits = found.pop(signature.logits)
            new = step.valid[:, step.cached :]
            if not signature.last_only and logits.shape[:2] == new.shape:
                read[LOGITS] = logits[new]
                read[LAST] = np.stack([row[count - 1] for row, count in zip(logits, step.counts)])
            else:
                read[LAST] = logits[:, -1]
        for cache in signature.caches:
            read[f"{cache.role} cache of layer {cache.layer}"] = self._valid(found.pop(cache.present), step)
        for cache in signature.encoder_caches:
            found.pop(cache.present, None)
        return read | found

    def _valid(self, present: np.ndarray, step: Step) -> np.ndarray:
        slots = present.swapaxes(1, 2)
        if self.signature.static:
            totals = zip(step.lengths, step.counts)
            return np.concatenate([row[: length + count] for row, (length, count) in zip(slots, totals)])
        return slots[step.valid] if slots.shape[:2] == step.valid.shape else slots

    def _feeds(self, step: Step) -> dict[str, np.ndarray]:
        names = self.signature
        lengths, counts = np.array(step.lengths), np.array(step.counts)
        tokens = _random("tokens", step.positions.shape, self.vocabulary)
        known = step_values(names, tokens, step.positions, np.array(self.alphas[: len(counts)]), lengths, counts)
        known |= made_up(names.layout, len(counts), names.capacity if names.static else step.cached + step.new)
        known |= {cache.past: self._past(cache, step) for cache in names.caches}
        known |= {cache.past: self._past(cache, step, encoder=True) for cache in names.encoder_caches}
        if names.mask in self.inputs:
            known[names.mask] = mask_values(self.inputs[names.mask], names, lengths, counts)
        symbols = {}
        for name, values in known.items():
            if name in self.inputs:
                symbols |= dict(zip(_sizes(self.inputs[name]), values.shape))
        feeds = {}
        for name, tensor in self.inputs.items():
            values = known.get(name)
            if values is None:
                shape = [size if isinstance(size, int) else symbols.get(size, ANY_SIZE) for size in _sizes(tensor)]
                values = _random(name, shape, None if _is_float(tensor.elem_type) else 2)
            feeds[name] = values.astype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return feeds

    def _past(self, cache: Cache, step: Step, encoder: bool = False) -> np.ndarray:
        _, heads, _, head_dim = _sizes(self.inputs[cache.past])
        head_dim = head_dim if isinstance(head_dim, int) else self.signature.head_dim
        if not isinstance(heads, int) or head_dim < 1:
            raise Unrunnable(f"heads or width of {cache.past} are not written in the graph")
        key = f"{cache.layer}.{cache.role}"
        slots = ANY_SIZE if encoder else step.cached
        past = _random(key, (len(step.counts), heads, slots, head_dim))
        if not self.signature.static or encoder:
            return past
        beyond = (len(step.counts), heads, self.signature.capacity - slots, head_dim)
        return np.concatenate([past, _random(f"beyond {key}", beyond)], axis=2)


def _standard(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in ops that onnxruntime computes, at full accuracy."""
    copy = at_full_accuracy(runnable(model))
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


def _random(key: str, shape: tuple[int, ...] | list[int], below: int | None = None) -> np.ndarray:
    """The same numbers for the same key: normal ones, or integers below a bound."""
    random = np.random.default_rng(zlib.crc32(key.encode()))
    return random.standard_normal(shape, np.float32) if below is None else random.integers(0, below, shape)


def _sizes(tensor: onnx.TypeProto.Tensor) -> list[int | str]:
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]


def _is_float(elem_type: int) -> bool:
    return elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def _brief(error: Exception) -> str:
    return str(error).strip().splitlines()[0].split(" was false.")[-1].strip()[-200:]
