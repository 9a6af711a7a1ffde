"""Level 4 away from home: a folder that a machine with a GPU can run, and its results as a model to compare.

bundle/run.py, engine.py      run with `python run.py`: numpy, torch and TensorRT are all they need
bundle/engine.json            what build/ knows of the engine
bundle/model.engine           the engine
bundle/weights/               the lowered graph and its weights, for standard TensorRT to build there
bundle/steps.npz              inputs of every scenario's steps, and the logits that onnxruntime expects
bundle/bundle.json            the scenarios, the tolerance, and what ties the bundle to its pipeline
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from suture.core.arrays import read_npz
from suture.core.errors import UserError
from suture.core.identity import Contents
from suture.core.reader import parse_json, read_json
from suture.core.refusals import BrokenFile, refusals
from suture.core.signature import Signature, find_signature
from suture.core.stage import Stage
from suture.core.step_inputs import Embed
from suture.core.tensors import references
from suture.core.tolerances import between_sessions
from suture.core.typed import Strict, check
from suture.core.weights import load_graph, weight_files, weights_root
from suture.runtime import engine as runtime_engine
from suture.runtime.decoders import Decoder, OfSignature, StaticDecoder
from suture.runtime.engine import takes, to_numpy
from suture.runtime.engine_decoder import signature_of
from suture.runtime.graphs import OnnxDecoder, open_graph
from suture.validate.runners import valid_logits
from suture.validate.scenarios import Scenario

SENT = {"run.py": Path(__file__).with_name("bundle_run.py"), "engine.py": Path(runtime_engine.__file__)}
MOST_BYTES = 500_000_000  # of one scenario's logits and caches
REMEDY = "name the results.npz that the bundle's run.py wrote"
FEED = ("tokens", "counts", "alpha")


class Described(Strict):
    name: str
    what: str
    steps: Annotated[int, Field(ge=1, le=100_000)]


class About(Strict):
    """What results.npz says of itself: bundle.json, and where it ran."""

    identity: str
    gpu: str
    tensorrt: str
    decode_seconds: float | None
    scenarios: Annotated[list[Described], Field(min_length=1)]
    left_out: list[str]


def write_bundle(
    portable: Path,
    lowered: Path,
    engine: Path,
    out: Path,
    scenarios: Callable[[OnnxDecoder], list[Scenario]],
    tolerance: float | None,
    embed: Embed | None = None,
) -> dict:
    """Writes the bundle into `out` and returns what bundle.json holds. `scenarios` makes them for the opened graph;
    `embed`: the embeddings of a graph that takes such."""
    description = read_json(engine.with_name("engine.json"))
    if description["signature"] is None or not signature_of(description).static:
        raise UserError(engine, "its caches grow, and a bundle binds caches in place", "run surgery with --cache static")
    graph = replace(open_graph(portable, "portable"), embed=embed)
    weights = {file for path in (portable, lowered) for file in weight_files(load_graph(path), weights_root(path))}
    read = [portable, lowered, *sorted(weights), engine, engine.with_name("engine.json")]
    stage = Stage("validate.bundle", out, read, options={"tolerance": tolerance}, writes=("bundle.json", *SENT))
    with stage.writing() as folder:
        kept, left_out = _selected(scenarios(graph), graph, description)
        arrays = {}
        for number, scenario in enumerate(kept):
            arrays |= _expected(graph, scenario, number)
        np.savez(folder / "steps.npz", **arrays)
        for name, source in SENT.items():
            shutil.copyfile(source, folder / name)
        shutil.copyfile(engine, folder / "model.engine")
        _send_weights(lowered, folder / "weights")
        description["weights"]["root"] = "weights"
        _write(folder / "engine.json", description)
        bundle = {
            "identity": identity(portable, lowered),
            "tolerance": tolerance or between_sessions({graph.dtype}),
            "scenarios": [{"name": each.name, "what": each.what, "steps": len(each.steps)} for each in kept],
            "left_out": left_out,
        }
        _write(folder / "bundle.json", bundle)
    return bundle


def identity(portable: Path, lowered: Path) -> str:
    """What ties results to the graphs that they were made from."""
    contents = Contents("validate")
    contents.learn(portable.parent)
    read = [portable, lowered, *weight_files(load_graph(portable), weights_root(portable))]
    return hashlib.sha256(json.dumps([contents.of(path)["sha256"] for path in read]).encode()).hexdigest()


@dataclass(frozen=True)
class Results(OfSignature):
    """What run.py brought back, as a suture.validate.runners.SteppedModel: it replays the logits and caches of known steps."""

    vocab: int
    scenarios: list[Scenario]
    notes: list[str]
    arrays: dict[str, np.ndarray] = field(repr=False)

    def decoder(self, batch: int) -> Decoder:
        return _Replay(self, batch)


class _Replay:
    def __init__(self, results: Results, batch: int):
        self.results, self.lengths = results, np.zeros(batch, np.int64)
        self.scenario, self.at = None, 0

    def step(self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        if self.scenario is None:
            self.scenario = self._beginning_with(tokens_BS, counts)
        logits = self.results.arrays[f"{self.scenario}/{self.at}/logits"]
        self.lengths, self.at = self.lengths + counts, self.at + 1
        return logits

    def caches(self) -> list[np.ndarray]:
        return [self.results.arrays[f"{self.scenario}/{cache.past}"] for cache in self.results.signature.caches]

    def _beginning_with(self, tokens_BS: np.ndarray, counts: np.ndarray) -> int:
        for number, scenario in enumerate(self.results.scenarios):
            first = scenario.steps[0]
            if np.array_equal(first["counts"], counts) and np.array_equal(first["tokens"], tokens_BS):
                return number
        raise ValueError("the results have no scenario that begins with these tokens")


def read_results(path: Path, portable: Path, lowered: Path) -> Results:
    """Raises UserError for a file that run.py did not write, or wrote for other graphs."""
    arrays = read_npz(path, "result of a bundle", REMEDY)
    about = parse_json(str(arrays.pop("about", "")).encode(), f"{path}, about")
    check(about, About, path, REMEDY)
    if about["identity"] != identity(portable, lowered):
        raise UserError(path, "comes from other graphs than this folder's", "make the bundle again and run it")
    signature = find_signature(load_graph(portable), portable)
    with refusals(path, "is not a result of a bundle", REMEDY):
        for number, each in enumerate(about["scenarios"]):
            _check_arrays(arrays, number, each["steps"], signature)
    scenarios = [
        Scenario(each["name"], each["what"], [_step(arrays, number, step, each["steps"]) for step in range(each["steps"])])
        for number, each in enumerate(about["scenarios"])
    ]
    notes = [f"Ran on {about['gpu']} with {about['tensorrt']}"]
    if about.get("decode_seconds"):
        notes.append(f"A decoding step took {1000 * about['decode_seconds']:.2f} ms (median, one sequence, copies included)")
    notes += [f"Left out of the bundle: {each}" for each in about["left_out"]]
    return Results("engine", signature, arrays["0/0/logits"].shape[-1], scenarios, notes, arrays)


def _check_arrays(arrays: dict[str, np.ndarray], number: int, steps: int, signature: Signature) -> None:
    """Raises where a scenario's arrays are not there, or not of the shapes and values that the graph takes and gives."""
    written = 0
    for step in range(steps):
        tokens, counts, alpha, logits = (arrays[f"{number}/{step}/{name}"] for name in (*FEED, "logits"))
        rows, width = tokens.shape
        written = written + counts
        if not (
            tokens.dtype == counts.dtype == np.int64 and alpha.dtype == np.float32 and counts.shape == alpha.shape == (rows,)
        ):
            raise BrokenFile(f"has tokens, counts or scales of other types or shapes in scenario {number}")
        if tokens.min() < 0 or tokens.max() >= arrays["0/0/logits"].shape[-1] or counts.min() < 0 or counts.max() > width:
            raise BrokenFile(f"has tokens or counts that there are not in scenario {number}")
        if logits.dtype.kind != "f" or logits.shape not in {
            (rows, each, arrays["0/0/logits"].shape[-1]) for each in (1, width)
        }:
            raise BrokenFile(f"has logits {list(logits.shape)} in scenario {number}")
        if signature.capacity is not None and written.max() > signature.capacity:
            raise BrokenFile(f"has more tokens than slots in scenario {number}")
    for cache in signature.caches:
        if (found := arrays[f"{number}/{cache.past}"]).dtype.kind != "f" or found.ndim != 4 or found.shape[2] < written.max():
            raise BrokenFile(f"has a cache {list(found.shape)} in scenario {number}")


def _step(arrays: dict, number: int, step: int, steps: int) -> dict[str, np.ndarray]:
    found = {name: arrays[f"{number}/{step}/{name}"] for name in FEED}
    return {**found, "final": np.array(step == steps - 1)}


def _selected(scenarios: list[Scenario], graph: OnnxDecoder, description: dict) -> tuple[list[Scenario], list[str]]:
    kept, left_out = [], []
    slot_bytes = sum(4 * kv_heads * head_dim for kv_heads, _, head_dim in graph.cache_shapes)
    for scenario in scenarios:
        shapes = {step["tokens"].shape for step in scenario.steps}
        size = sum(batch * width for batch, width in (step["tokens"].shape for step in scenario.steps)) * graph.vocab * 4
        size += next(iter(shapes))[0] * scenario.slots * slot_bytes
        if scenario.slots > graph.capacity:
            left_out.append(f"{scenario.name}, which needs {scenario.slots} cache slots")
        elif not all(takes(description, batch, int(width)) for batch, width in shapes):
            left_out.append(f"{scenario.name}, whose steps no profile of the engine allows")
        elif size > MOST_BYTES:
            left_out.append(f"{scenario.name}, whose outputs take {size / 1e9:.1f} GB")
        else:
            kept.append(scenario)
    if not kept:
        raise UserError("bundle", f"no scenario fits the engine: {'; '.join(left_out)}", "build with a larger --max-batch")
    return kept, left_out


def _expected(graph: OnnxDecoder, scenario: Scenario, number: int) -> dict[str, np.ndarray]:
    """What the engine is fed, at each step and for all of them, what scenario it belongs to, and the valid tokens' logits."""
    arrays = {}
    decoder = graph.decoder(len(scenario.steps[0]["tokens"]))
    assert isinstance(decoder, StaticDecoder)
    arrays |= {f"{number}/constant/{name}": to_numpy(value) for name, value in decoder.session.crossed.items()}
    for index, step in enumerate(scenario.steps):
        asked = [step[name] for name in FEED]
        place = f"{number}/{index}"
        arrays |= {f"{place}/{name}": step[name] for name in FEED}
        arrays |= {f"{place}/feed/{name}": value for name, value in decoder.feeds(*asked).items()}
        arrays[f"{place}/expected"] = valid_logits(decoder.step(*asked), step["counts"], graph.last_only)
    return arrays


def _send_weights(lowered: Path, folder: Path) -> None:
    proto, root = load_graph(lowered), weights_root(lowered)
    folder.mkdir()
    shutil.copyfile(lowered, folder / lowered.name)
    for location in {reference["location"] for _, reference in references(proto)}:
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / location, folder / location)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
