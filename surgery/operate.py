"""Surgery in memory: a model in, the portable and the lowered model out."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx

from suture.core.errors import UserError
from suture.core.joined import join
from suture.core.loads import check_loads
from suture.core.onnx_checks import check_model
from suture.core.proof.prove import prove
from suture.core.proof.steps import ALPHAS, NO_ALPHAS
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import DIFFERENT, DifferenceFound, Proof
from suture.core.repairs import repair
from suture.core.signature import Signature
from suture.core.tensors import check_places, embed_small, references
from suture.core.weights import load_graph, weights_root
from suture.surgery.graph import Graph, files
from suture.surgery.graph.branches import take
from suture.surgery.graph.cut import cut, once_name
from suture.surgery.graph.weights import new_file
from suture.surgery.options import SurgeryOptions
from suture.surgery.passes import Pass
from suture.surgery.plan import make_plan
from suture.surgery.quantize.options import Request, read_request
from suture.surgery.reports import picture
from suture.surgery.reports.report import SurgeryReport
from suture.surgery.runner import Verify, lower, make_portable, unverified
from suture.surgery.verification import loads
from suture.surgery.verification.verify import ChangedOutput, Verifier, narrow

PICTURED = 1  # the second layer: the first one also has what all layers share
IN_MEMORY = Path("model")  # what errors call a model that has no file
MODELS = ("model.onnx", "model.trt.onnx", "model.ort.onnx")  # portable, lowered, and in onnxruntime's contrib operators
FLOAT = "float"  # the folder, beside a quantised graph, of the same graph before it was quantised
AS_IT_COMES = SurgeryOptions()


@dataclass(frozen=True)
class Operated:
    """What surgery made of a model. External weights are relative to `root`, but for those in the files `added`."""

    portable: onnx.ModelProto
    lowered: onnx.ModelProto
    onnxruntime: onnx.ModelProto | None  # in onnxruntime's contrib operators, where the options ask for it
    once: tuple[tuple[onnx.ModelProto, onnx.ModelProto], ...]  # portable and lowered, of what was cut out of these
    report: SurgeryReport  # its `proof` is None until the graphs are proven
    root: Path
    added: frozenset[str]  # absolute paths of the files, in `folder`, that passes wrote weights into
    source: Subject  # what it was made of: what both are proven against
    signature: Signature  # of the portable graph, before anything was cut out of it
    pictures: dict[str, str]  # of the second layer, "before" and "after", as SVG; none where no names say layers

    @property
    def files(self) -> dict[str, onnx.ModelProto]:
        """All models, by the name of the file that surgery writes each into."""
        named = dict(zip(MODELS, (self.portable, self.lowered, self.onnxruntime)))
        for number, (portable, lowered) in enumerate(self.once, 1):
            named |= {f"{once_name(number)}.onnx": portable, f"{once_name(number)}.trt.onnx": lowered}
        return {name: model for name, model in named.items() if model is not None}

    @property
    def models(self) -> list[onnx.ModelProto]:
        return list(self.files.values())

    @property
    def whole(self) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        """The portable and the lowered graph, with what was cut out of them."""
        portable, lowered = self.portable, self.lowered
        for each, below in self.once:
            portable, lowered = (_again(*pair, self.source) for pair in ((each, portable), (below, lowered)))
        return portable, lowered


@contextmanager
def collection_paused() -> Iterator[None]:
    """A graph is one large cycle of nodes and tensors: the collector would walk all of it, over and over, for nothing."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@collection_paused()
def operate(
    model: onnx.ModelProto | Path, options: SurgeryOptions = AS_IT_COMES, root: Path | None = None, folder: Path | None = None
) -> Operated:
    """Surgery on a model, or on the one in a file, which stay as they are.

    `root`: the folder that a model's external weights are relative to (default: the working directory; a file says so
    itself). `folder`: where weights that passes make are written, and the graph before it is quantised; None: the weights
    stay in the models. Raises UserError for what surgery cannot read or do, ChangedOutput where `options.verify` finds one.
    """
    plan, request = make_plan(options), read_request(options)
    source, name, root = _source(model, root)
    if not isinstance(model, Path):
        source = _copy(source)
    embed_small(source, name, root)
    try:
        notes = take(source, name, options.branch)
    except UserError:
        check_model(source, name)  # what is broken comes before what is to be chosen
        raise
    notes = [*notes, *repair(source, name)]
    check_loads(source, name, root)
    graph = files.of_repaired(_copy(source), name, root, options.past, options.roles, notes)
    read = Subject(source, graph.signature, root)
    graph.weights_file = folder and new_file(folder)
    pictures = {"before": picture.draw_layer(graph, PICTURED, f"Layer {PICTURED} before surgery")}
    verifier = Verifier(source, graph.signature, root) if options.verify or options.bisect else None
    quantise = request and Pass("quantise", str(request), Quantising(request, name, folder, verifier))
    report = SurgeryReport()
    try:
        portable = make_portable(graph, plan.portable, report, verifier or unverified, quantise)
        once, step, notes = cut(portable, options.once)
        report.notes += notes
        forms = [step, lower(step, plan.lowering, report, _anew(verifier, step) if once else verifier or unverified)]
        if options.onnxruntime:  # its tables are those of rows that dynamic NTK leaves alone
            verify = _anew(verifier, step, NO_ALPHAS)
            forms.append(lower(step, plan.ort_contrib, report, verify, form="ort_contrib"))
        for number, each in enumerate(once, 1):
            report.count(once_name(number), each)
            verify = _anew(verifier, each)
            forms += [each, lower(each, plan.lowering, report, verify, form=f"{once_name(number)} lowered")]
    except ChangedOutput as found:
        raise (narrow(found, plan, folder) if options.bisect else found) from None
    pictures["after"] = picture.draw_layer(portable, PICTURED, f"Layer {PICTURED} after surgery")
    models = [files.without_shapes(files.to_model(each)) for each in forms]
    cut_out = models[len(models) - 2 * len(once) :]
    for each in (models[0], *cut_out[::2]):
        loads.check_written(each, name)
    return Operated(
        portable=models[0],
        lowered=models[1],
        onnxruntime=models[2] if options.onnxruntime else None,
        once=tuple(zip(cut_out[::2], cut_out[1::2])),
        report=report,
        root=root,
        source=read,
        signature=portable.signature,
        added=frozenset().union(*(each.added for each in forms)),
        pictures={name: drawn for name, drawn in pictures.items() if drawn} if all(pictures.values()) else {},
    )


def proven(operated: Operated, options: SurgeryOptions, root: Path | None = None, unquantised: Subject | None = None) -> Proof:
    """Proves both graphs, and writes into the report what was found. `root`: of their weights, where that is no longer the
    source's; `unquantised`: the portable graph from before it was quantised. Raises DifferenceFound."""
    whole, whole_lowered = operated.whole
    portable = Subject(whole, operated.signature, operated.root if root is None else root)
    quantised = bool(options.quantize) or options.kv_cache != "none"
    everything = options.verify or options.bisect
    proof = prove(operated.source, portable, whole_lowered, unquantised, quantised=quantised, whole=everything)
    operated.report.proof = proof.as_json()
    if proof.status == DIFFERENT:
        raise DifferenceFound(proof)
    return proof


def _again(once: onnx.ModelProto, step: onnx.ModelProto, source: Subject) -> onnx.ModelProto:
    """Both as one graph, with the source's outputs."""
    outputs = {value.name for value in once.graph.output} & {value.name for value in source.model.graph.output}
    return join(once, step, ("once.onnx", "model.onnx"), keep=outputs).model


def _anew(verifier: Verifier | None, graph: Graph, alphas: tuple[float, ...] = ALPHAS) -> Verify:
    """Verifies what is made of this graph, where that is asked for."""
    return Verifier(files.to_model(graph), graph.signature, graph.root, alphas, graph.added) if verifier else unverified


def _source(model: onnx.ModelProto | Path, root: Path | None) -> tuple[onnx.ModelProto, Path, Path]:
    """The model, what errors call it, and the folder that its external weights are relative to."""
    if isinstance(model, Path):
        return load_graph(model, types=False), model, weights_root(model)
    root = Path() if root is None else root
    check_places(model, IN_MEMORY, root)
    return model, IN_MEMORY, root


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


@dataclass
class Quantising:
    """Quantises a finished portable graph, of the model in file `source`; what follows is verified against the result."""

    request: Request
    source: Path
    folder: Path | None
    verifier: Verifier | None

    def __call__(self, graph: Graph) -> int:
        from suture.surgery.quantize.calibration import read_windows  # only here: torch takes 0.2 GB and seconds
        from suture.surgery.quantize.run import quantise

        if self.folder is not None:
            _keep_float(graph, self.folder / FLOAT)
            graph.weights_file = new_file(self.folder, "quantised")
        windows = read_windows(self.request, self.source, graph.signature.capacity) if self.request.calibrated else None
        matches = quantise(graph, self.request, windows)
        if self.verifier is not None:
            self.verifier.restart(graph)
        return matches


def _keep_float(graph: Graph, folder: Path) -> None:
    """Writes the portable graph as it is before it is quantised, over the source's weights: what the exported graph can
    be compared with. Not where passes have made weights of their own, which are not kept."""
    model = files.without_shapes(files.to_model(graph))
    if not any(reference["location"] in graph.added for _, reference in references(model)):
        folder.mkdir()
        onnx.save(model, folder / "model.onnx")
