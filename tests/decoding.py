"""Any graph of a language model, stepped through prompts and decoding in onnxruntime: what surgery must not change.

The reference runs each row alone and without padding; the graph after surgery runs all rows in one batch, padded on the
right, ragged batches, over a cache full of noise. Nothing of the pipeline's own validation is used here.
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from suture.core.sessions import ROOT_OPTION
from suture.core.signature import Signature, find_signature

# tokens that each of three rows adds, step after step
SCHEDULE = ([7, 3, 5], [1, 4, 2], [1, 1, 1], [1, 0, 1], [3, 1, 1])
ENCODER_SLOTS = 7
LONGEST_ROW = int(np.sum(SCHEDULE, axis=0).max())


class Steps:
    """One batch of rows in one graph."""

    def __init__(self, model: onnx.ModelProto, rows: int, root: Path = Path("."), past: str | None = None):
        self.names: Signature = find_signature(model, past_pattern=past, need_caches=False)
        options = ort.SessionOptions()
        options.graph_optimization_level = (
            ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        )  # it takes some broken graphs for whole ones
        options.enable_mem_reuse = all(node.op_type != "MultiHeadAttention" for node in model.graph.node)  # dies in float16
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.add_session_config_entry(ROOT_OPTION, str(root))
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.also: list[str] = []  # more outputs to fetch
        self.shown: list[np.ndarray] = []  # and their values at the last step
        self.lengths = np.zeros(rows, np.int64)
        noise = np.random.default_rng(1)
        self.caches = {}
        for cache in self.names.caches:
            _, heads, slots, size = self.inputs[cache.past].shape
            slots = slots if self.names.static else 0
            self.caches[cache.past] = noise.normal(size=(rows, heads, slots, size)).astype(self.dtype(cache.past))

    def dtype(self, name: str) -> type:
        kinds = {"float": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32, "bool": np.bool_}
        return kinds[self.inputs[name].type[len("tensor(") : -1]]

    def step(self, tokens_BS: np.ndarray, counts: np.ndarray, encoder: np.ndarray | None = None) -> np.ndarray:
        """Logits [B,S,vocab]; `counts`: how many of each row's tokens are valid, on the left. `encoder`: caches of an
        encoder's keys and values [caches, B, heads, slots, head_dim], as rows need them."""
        names, (rows, steps) = self.names, tokens_BS.shape
        slots = self.lengths[:, None] + np.arange(steps)
        feeds = {names.tokens: tokens_BS, names.positions: np.minimum(slots, LONGEST_ROW), names.write_indices: self.lengths}
        feeds |= {names.sequence_lengths: counts, names.ntk_alpha: np.ones(rows)}
        if names.mask is not None:
            feeds[names.mask] = self._mask(slots, rows, steps)
        for index, cache in enumerate(names.encoder_caches):
            feeds[cache.past] = encoder[index]
        feeds = {name: value.astype(self.dtype(name)) for name, value in feeds.items() if name is not None} | self.caches
        outputs = [names.logits, *(cache.present for cache in names.caches)]
        logits, *others = self.session.run([*outputs, *self.also], feeds)
        presents, self.shown = others[: len(names.caches)], others[len(names.caches) :]
        self._check(presents, steps)
        self.caches = {cache.past: present for cache, present in zip(names.caches, presents)}
        self.lengths = self.lengths + counts
        return logits

    def _check(self, presents: list[np.ndarray], steps: int) -> None:
        """Raises ValueError where a cache did not grow by the step's tokens: onnxruntime drops what is empty from a Concat."""
        for past, present in zip(self.caches.values(), presents):
            grown = steps * (not self.names.static)
            if present.shape != (*past.shape[:2], past.shape[2] + grown, past.shape[3]):
                raise ValueError(f"a cache of {past.shape} became {present.shape}")

    def _mask(self, slots: np.ndarray, rows: int, steps: int) -> np.ndarray:
        shape = self.inputs[self.names.mask].shape
        if len(shape) == 4:  # what each token sees of a static cache
            return np.arange(self.names.capacity) <= slots[:, None, :, None]
        return np.ones((rows, int(self.lengths[0]) + steps))

    def valid_slots(self) -> list[list[np.ndarray]]:
        """Of each cache and row [heads, tokens so far, head_dim]."""
        return [[row[:, :length] for row, length in zip(cache, self.lengths)] for cache in self.caches.values()]


def decode(model: onnx.ModelProto, alone: bool, seed: int = 0, **options) -> dict[str, np.ndarray]:
    """Logits [valid tokens of all rows, vocab], row after row, and each cache likewise. With `alone`, rows run one by one
    without padding: the reference."""
    random = np.random.default_rng(seed)
    schedule = np.array(SCHEDULE)
    rows = schedule.shape[1]
    first = Steps(model, rows, **options)
    vocab = first.session.get_outputs()[0].shape[-1]
    tokens = [random.integers(3, vocab, total) for total in schedule.sum(axis=0)]
    encoder = [_encoder_cache(first, cache.past, rows, random) for cache in first.names.encoder_caches]
    logits = [[] for _ in range(rows)]
    alone = alone or not first.names.static  # a growing cache cannot hold rows of different lengths side by side
    batches = [[row] for row in range(rows)] if alone else [list(range(rows))]
    caches = []
    for batch in batches:
        steps = first if not alone else Steps(model, 1, **options)
        for counts in schedule[:, batch]:
            if not counts.max():
                continue
            step = np.zeros((len(batch), counts.max()), np.int64)
            for place, row in enumerate(batch):
                done = steps.lengths[place]
                step[place, : counts[place]] = tokens[row][done : done + counts[place]]
            result = steps.step(step, counts, [cache[batch] for cache in encoder])
            for place, row in enumerate(batch):
                logits[row].append(result[place, : counts[place]].astype(np.float32))
        caches.append(steps.valid_slots())
    found = {"logits": np.concatenate([part for row in logits for part in row])}
    for index, cache in enumerate(first.names.caches):
        valid = [row for each in caches for row in each[index]]
        found[f"{cache.layer}.{cache.role}"] = np.concatenate([row.swapaxes(0, 1) for row in valid]).astype(np.float32)
    return found


def _encoder_cache(steps: Steps, name: str, rows: int, random: np.random.Generator) -> np.ndarray:
    _, heads, slots, size = steps.inputs[name].shape
    slots = slots if isinstance(slots, int) else ENCODER_SLOTS
    return random.normal(size=(rows, heads, slots, size)).astype(steps.dtype(name))


def largest_error(reference: dict[str, np.ndarray], candidate: dict[str, np.ndarray]) -> float:
    """Of all outputs: the largest difference, of the largest value that the reference has."""
    assert reference.keys() == candidate.keys()
    worst = 0.0
    for name, expected in reference.items():
        assert np.isfinite(expected).all(), name
        assert expected.shape == candidate[name].shape, name
        error = np.abs(candidate[name] - expected).max() / np.abs(expected).max()
        worst = max(worst, float("inf") if np.isnan(error) else float(error))
    return worst
