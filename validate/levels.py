"""The levels of validation that a pipeline's folder allows, each a comparison with the step before.

Of each part: 1 PyTorch ↔ exported graph. 2 Exported ↔ portable graph. 3 Portable graph ↔ TensorRT's network. 4 Portable graph ↔
engine. Of the whole model: 5 PyTorch ↔ portable graph on real text, or on pictures, masks or frames that it makes. A level that
this machine cannot run says why; it has not passed. A level whose files are broken or lost, though a stage wrote them, has failed.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from onnx import TensorProto

from suture.core.driving import drives
from suture.core.errors import UserError
from suture.core.frames import makes_frames
from suture.core.masks import makes_masks
from suture.core.network.evaluate import NotEvaluated
from suture.core.network.parse import NoTensorRT
from suture.core.parts import DECODER
from suture.core.pictures import answers_about_pictures
from suture.core.reader import read_json
from suture.core.signature import Signature
from suture.core.tolerances import REWRITTEN, ROUNDED
from suture.runtime.engine import takes, why_not
from suture.runtime.engine_decoder import EngineModel, open_engine
from suture.runtime.graphs import OnnxDecoder, open_embedding, open_graph
from suture.runtime.network_decoder import NetworkModel, open_network
from suture.validate.bundle import Results, read_results
from suture.validate.compare import NOT_RUN, ScenarioResult, compare
from suture.validate.graph_part import graph_level
from suture.validate.level import SHADOW_COPY_NOTE, TITLES, BrokenStage, Level, failed, not_run
from suture.validate.pictures import TITLE as PICTURES
from suture.validate.pictures import is_picture_model, picture_level
from suture.validate.pipeline import NOT_HERE, PartFiles, Pipeline
from suture.validate.progress import Progress
from suture.validate.proven import compared_here, level_of, recorded, with_pair
from suture.validate.reference import open_reference
from suture.validate.runners import SteppedModel
from suture.validate.scenarios import Scenario, make_scenarios, random_tokens, text_tokens
from suture.validate.text_level import read_text, token_level

NO_TOKENS = "no part of the model writes tokens"
OWN_LOOP = "the loop between a transformer and its latents is diffusers' pipeline, which takes its own networks"

LAYERWISE_NOTE = (
    "The model is too large to be loaded at once: it ran layer by layer, in few steps, over caches of few slots, which "
    "nothing but their shapes depends on"
)


def run_levels(
    pipeline: Pipeline,
    tolerance: float | None,
    seed: int,
    save: Callable[[int, str], Path],
    progress: Progress,
    again: bool = True,
) -> list[Level]:
    """Levels 1 to 4 of each part, in the order in which they are called, then level 5 of the whole model.
    `save(level, scenario)` names Polygraphy's file. Unless they are to be compared `again`, levels 2 and 3 are taken over
    from surgery where it has proven the files that are here."""
    levels, decoder = [], None
    for files in pipeline.parts:
        name = f"{files.part.name}: " if len(pipeline.parts) > 1 else ""
        if files.part.kind == DECODER:
            saved = partial(_saved, save, files.part.name) if name else save
            checked = DecoderLevels(pipeline, files, tolerance, seed, saved, progress.tell)
            decoder = decoder or checked
            check = checked.check
        else:
            check = partial(graph_level, files, pipeline.checkpoint, tolerance, seed)
        proven = {} if again else recorded(files)
        here = {} if proven else compared_here(files)
        for number in (1, 2, 3, 4):

            def found(number: int = number, check=check, proven=proven, here=here) -> Level:
                return level_of(proven[number]) if number in proven else with_pair(check(number), here.get(number))

            levels.append(progress.level(f"level {number}, {name}{TITLES[number]}", found))
            levels[-1].title = name + TITLES[number]
    title, whole = TITLES[5], partial(decoder.check, 5) if decoder else partial(not_run, 5, NO_TOKENS)
    if makes_masks(files.part for files in pipeline.parts):
        from suture.validate.masks import TITLE, masks_level  # here: what prepares pictures takes seconds

        title, whole = TITLE, partial(masks_level, pipeline, seed)
    if makes_frames(files.part for files in pipeline.parts):
        from suture.validate.frames import TITLE as FRAMES
        from suture.validate.frames import frames_level

        title, whole = FRAMES, partial(frames_level, pipeline, seed)
    if drives(files.part for files in pipeline.parts):
        from suture.validate.driving import TITLE as DRIVE
        from suture.validate.driving import driving_level

        title, whole = DRIVE, partial(driving_level, pipeline, seed)
    if any(files.part.name == "vae_decoder" for files in pipeline.parts):
        title, whole = PICTURES, partial(not_run, 5, OWN_LOOP)
    if answers_about_pictures({files.part.name for files in pipeline.parts}):
        from suture.validate.answers import TITLE, answers_level  # as above

        title, whole = TITLE, partial(answers_level, pipeline, seed, progress.tell)
    if is_picture_model(tuple(files.part for files in pipeline.parts)):
        title, whole = PICTURES, partial(picture_level, pipeline, seed, progress.tell)
    levels.append(progress.level(f"level 5, {title}", whole))
    return levels


def _saved(save: Callable[[int, str], Path], part: str, number: int, scenario: str) -> Path:
    return save(number, f"{part}-{scenario}")


class DecoderLevels:
    """The levels of a part that is a step with a KV cache, its graphs opened once for all."""

    def __init__(
        self,
        pipeline: Pipeline,
        files: PartFiles,
        tolerance: float | None,
        seed: int,
        save: Callable[[int, str], Path],
        tell: Callable[[str], None],
    ):
        self.pipeline, self.files, self.tolerance, self.save, self.tell = pipeline, files, tolerance, save, tell
        self.exported, self.portable = _opened(files.exported, "exported"), _opened(files.portable, "portable")
        self.imported = None if isinstance(self.portable, BrokenStage) else _imported(pipeline.results, files)
        self.embed = open_embedding(pipeline.embed) if pipeline.embed else None
        self.tokenizer, self.ids, self.no_text = read_text(pipeline)
        known = next((graph for graph in (self.exported, self.portable) if isinstance(graph, OnnxDecoder)), None)
        self.large = known is not None and known.layerwise
        capacity = self.portable.capacity if isinstance(self.portable, OnnxDecoder) else None
        self.scenarios: list[Scenario] = []  # of none, where there is no graph to ask
        if known:
            source = text_tokens(self.ids, seed) if self.ids else random_tokens(known.vocab, seed)
            self.scenarios = make_scenarios(source, capacity, known.trained_length, self.large, known.prefix)

    def check(self, number: int) -> Level:
        exported, portable = self.exported, self.portable
        needs = {1: [exported], 2: [exported, portable], 3: [portable], 4: [portable], 5: [portable]}
        broken = next((each for each in needs[number] if isinstance(each, BrokenStage)), None)
        if broken:
            return failed(number, broken.reason)
        if number == 1:
            return _export_level(self.pipeline, exported, self._run, self.tell)
        if number == 2:
            return _surgery_level(self.files, exported, portable, self._run)
        if number == 3:
            return _network_level(self.files, portable, self._run, self.tell)
        if number == 4:
            return _engine_level(self.files, self.imported, portable, self.scenarios, self._run, self.tell)
        return self._text_level()

    def _run(
        self,
        number: int,
        reference: SteppedModel,
        candidate: SteppedModel,
        allowed: float | None = None,
        asked: list[Scenario] | None = None,
    ) -> Level:
        comparison = compare(
            self._embedding(reference),
            self._embedding(candidate),
            self.scenarios if asked is None else asked,
            self.tolerance or allowed,
            save=lambda scenario: self.save(number, scenario),
            tell=lambda scenario: self.tell(f"level {number}: {scenario}"),
        )
        notes = [SHADOW_COPY_NOTE] if candidate.dtype == TensorProto.BFLOAT16 else []
        notes += [LAYERWISE_NOTE] if self.large else []
        return Level(number, TITLES[number], comparison.status, comparison=comparison, notes=notes)

    def _embedding(self, model: SteppedModel) -> SteppedModel:
        """A graph that takes embeddings gets the model's own."""
        takes = self.embed and isinstance(model, OnnxDecoder | NetworkModel | EngineModel)
        return replace(model, embed=self.embed) if takes else model

    def _text_level(self) -> Level:
        if not (self.pipeline.checkpoint and self.portable):
            return not_run(5, "needs the checkpoint and the portable graph")
        if self.large:
            return not_run(5, "a model that runs layer by layer takes too long to read a text")
        if self.no_text:
            return not_run(5, self.no_text)
        self.tell("level 5: reading text")
        return token_level(self.pipeline, self._embedding(self.portable), self.tokenizer, self.ids)


def compare_graphs(
    reference: OnnxDecoder,
    candidate: OnnxDecoder,
    tolerance: float | None = None,
    seed: int = 0,
    save: Callable[[str], Path] | None = None,
    tell: Callable[[str], None] = lambda scenario: None,
) -> Level:
    """Any two graphs with KV caches on random tokens. Raises UserError where they are not of one model."""
    for what in ("vocab", "cache_names"):
        if (ours := getattr(reference, what)) != (theirs := getattr(candidate, what)):
            found = f"{ours} and {theirs}" if what == "vocab" else f"{len(ours)} and {len(theirs)}"
            label = "vocabularies of" if what == "vocab" else "caches that do not pair:"
            raise UserError(f"{reference.name}, {candidate.name}", f"{label} {found}", "compare graphs of one model")
    capacities = [graph.capacity for graph in (reference, candidate) if graph.capacity]
    trained = reference.trained_length or candidate.trained_length
    source, prefix = random_tokens(reference.vocab, seed), reference.prefix or candidate.prefix
    scenarios = make_scenarios(source, min(capacities, default=None), trained, prefix=prefix)
    comparison = compare(reference, candidate, scenarios, tolerance, save, tell)
    notes = [SHADOW_COPY_NOTE] if TensorProto.BFLOAT16 in (reference.dtype, candidate.dtype) else []
    return Level(None, "Reference ↔ candidate", comparison.status, comparison=comparison, notes=notes)


def _export_level(pipeline: Pipeline, exported: OnnxDecoder, run: Callable[..., Level], tell: Callable[[str], None]) -> Level:
    if pipeline.checkpoint is None:
        return not_run(1, NOT_HERE)
    tell("level 1: loading the checkpoint")
    return run(1, open_reference(pipeline.checkpoint, exported.dtype, pipeline.lora), exported)


def _surgery_level(files: PartFiles, exported: OnnxDecoder, portable: OnnxDecoder | None, run: Callable[..., Level]) -> Level:
    """What surgery made of the exported graph, up to where it quantised it: level 5 says what that does."""
    if portable is None:
        return not_run(2, "surgery has written no portable graph")
    if portable.quantised is None:
        return run(2, exported, portable)
    if files.unquantised is None:
        return not_run(2, "surgery has left no graph from before it quantised")
    unquantised = _opened(files.unquantised, "portable, not yet quantised")
    if isinstance(unquantised, BrokenStage):
        return failed(2, unquantised.reason)
    level = run(2, exported, unquantised)
    level.notes.append(f"The portable graph is quantised ({portable.quantised}); compared is what it was made of")
    return level


def _allowed(portable: OnnxDecoder) -> float:
    """Between onnxruntime and TensorRT, which computes bfloat16 as bfloat16."""
    return ROUNDED if portable.rounds else REWRITTEN[portable.dtype]


def _network_level(
    files: PartFiles, portable: OnnxDecoder | None, run: Callable[..., Level], tell: Callable[[str], None]
) -> Level:
    if portable is None or files.lowered is None:
        return not_run(3, "surgery has written no lowered graph")
    tell("level 3: TensorRT parses the lowered graph")
    try:
        network = open_network(files.lowered, "TensorRT's network")
    except (NoTensorRT, NotEvaluated) as error:
        return not_run(3, str(error))
    except UserError as error:
        return failed(3, error)
    if other := sorted(_names(portable.signature) ^ _names(network.signature)):
        return failed(
            3, f"{files.lowered}: an input or output of it or of the portable graph has another name: {', '.join(other)}"
        )
    return run(3, portable, network, _allowed(portable))


def _names(signature: Signature) -> set[str]:
    """Of all inputs and outputs: whoever runs an engine in a graph's place binds them by name."""
    return signature.inputs | {signature.logits or ""} | {cache.present for cache in signature.caches}


def _imported(results: Path | None, files: PartFiles) -> Results | None:
    """Read before any level takes time: what cannot be used is refused at once."""
    if results is None:
        return None
    if files.portable is None or files.lowered is None:
        raise UserError(results, "cannot be tied to surgery's graphs, which are not here", "run surgery again")
    return read_results(results, files.portable, files.lowered)


def _engine_level(
    files: PartFiles,
    imported: Results | None,
    portable: OnnxDecoder | None,
    scenarios: list[Scenario],
    run: Callable[..., Level],
    tell: Callable[[str], None],
) -> Level:
    if portable is None or files.engine is None:
        return not_run(4, "no engine has been built")
    allowed = _allowed(portable)
    if imported:
        level = run(4, portable, imported, allowed, imported.scenarios)
        level.notes += imported.notes
        return level
    try:
        description = read_json(files.engine.with_name("engine.json"))
        reason, expected, size = why_not(description), description["engine_bytes"], files.engine.stat().st_size
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return failed(4, f"{files.engine.parent}: what build wrote cannot be read ({type(error).__name__}: {error})")
    if size != expected:
        return failed(4, f"{files.engine}: has {size} bytes, and was built with {expected}")
    if reason:
        return not_run(4, f"{reason}; --bundle makes a folder to run where one is, and --import takes its results")
    tell("level 4: loading the engine")
    engine = open_engine(files.engine)
    fitting, others = [], []
    for scenario in scenarios:
        shapes = [step["tokens"].shape for step in scenario.steps]
        (fitting if all(takes(description, *shape) for shape in shapes) else others).append(scenario)
    level = run(4, portable, engine, allowed, fitting)
    for scenario in others:
        reason = "no profile of the engine allows its steps"
        level.comparison.scenarios.append(ScenarioResult(scenario.name, scenario.what, NOT_RUN, reason))
    engine.engine.save_runtime_cache()
    return level


def _opened(path: Path | None, name: str) -> OnnxDecoder | BrokenStage | None:
    if path is None:
        return None
    try:
        return open_graph(path, name)
    except UserError as error:
        return BrokenStage(str(error) if str(path) in str(error) else f"{path}: {error}")
