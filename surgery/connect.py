"""Two graphs' files as one, their weights by reference: surgery.join as a stage."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from suture.core.command import DONE, FOUND_DIFFERENCE
from suture.core.errors import UserError
from suture.core.joined import join
from suture.core.manifest import read_manifest
from suture.core.onnx_checks import check_model, onnx_refusals
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import DIFFERENT
from suture.core.repairs import repair
from suture.core.signature import find_signature
from suture.core.stage import Stage
from suture.core.tensors import embed_small, references, to_raw
from suture.core.traits import STANDARD
from suture.core.weights import MODEL_LIMIT, load_graph, place_below, weight_files, weights_root
from suture.surgery.graph import files
from suture.surgery.graph.opsets import upgrade
from suture.surgery.verification.chain import compare_chain

WRITTEN = "model.onnx"


@dataclass(frozen=True)
class Connection:
    """What the command line says of names: OUTPUT=INPUT, NAME=NEW and names of outputs (suture.core.joined.join)."""

    connect: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    no_verify: bool = False


@dataclass
class ConnectedGraph:
    """One of the graphs; its external weights lie under `root`."""

    path: Path
    model: onnx.ModelProto
    root: Path

    @property
    def version(self) -> int | None:
        return next((entry.version for entry in self.model.opset_import if entry.domain in STANDARD), None)

    @property
    def beside(self) -> bool:
        """Whether the weights that lie outside the graph lie in its own folder."""
        return self.root == Path(os.path.normpath(self.path.parent)) or not self.external

    @property
    def external(self) -> bool:
        return any(True for _ in references(self.model))


def connect(first: Path, second: Path, out: Path, connection: Connection, force: bool = False) -> int:
    """Writes `out`/model.onnx: outputs of the graph in file `first` are inputs of the one in `second`. Returns the exit
    status, that of a difference where the result does not compute what both do one after the other. Raises UserError where
    they cannot be joined."""
    pairs = _pairs(connection.connect, "--connect", key=1), _pairs(connection.rename, "--rename", key=0)
    parts = [ConnectedGraph(path, load_graph(path), weights_root(path)) for path in (first, second)]
    read = [path for part in parts for path in (part.path, *weight_files(part.model, part.root))]
    stage = Stage("surgery.join", out, list(dict.fromkeys(read)), asdict(connection), [WRITTEN])
    if stage.up_to_date() and not force:
        print(f"surgery.join: up to date, {(read_manifest(out) or {}).get('proof')} ({out})")
        return DONE
    if sum(part.model.ByteSize() for part in parts) >= MODEL_LIMIT:
        raise UserError(second, f"has more than 2 GB inside, with {first}", "save their weights beside them")
    _at_one_opset(parts)
    root = _under_one_root(parts)
    joined = join(parts[0].model, parts[1].model, (first, second), pairs[0], pairs[1], connection.keep)
    check_model(joined.model, out / WRITTEN)
    said = "not proven: --no-verify"
    if not connection.no_verify:
        found = compare_chain(
            *(_subject(model, root) for model in (parts[0].model, parts[1].model, joined.model)), joined.connected, pairs[1]
        )
        said = found.said
        if found.status == DIFFERENT:
            print(f"surgery.join: {said}; nothing was written")
            return FOUND_DIFFERENCE
    with stage.writing() as partial:
        stage.extra["weights_root"] = place_below(joined.model, second, root, all(part.beside for part in parts), partial, out)
        stage.extra["proof"] = said
        onnx.save(joined.model, partial / WRITTEN)
    connected = ", ".join(dict.fromkeys(joined.connected.values()))
    shared = f", {', '.join(joined.shared)} shared" if joined.shared else ""
    print(f"surgery.join: {connected} connected{shared} → {out}/{WRITTEN}")
    print(f"surgery.join: {said}")
    return DONE


def _pairs(given: tuple[str, ...], option: str, key: int) -> dict[str, str]:
    """A=B of an option's, by the `key`-th. Raises UserError where that comes twice."""
    pairs: dict[str, str] = {}
    for each in given:
        sides = each.split("=", 1)
        if sides[key] in pairs:
            raise UserError(f"{option} {each}", f"{sides[key]} has one already", "give it once")
        pairs[sides[key]] = sides[1 - key]
    return pairs


def _at_one_opset(parts: list[ConnectedGraph]) -> None:
    """Brings both to the newest opset that surgery knows, unless they are of one."""
    if len({part.version for part in parts} - {None}) < 2:
        return
    for part in parts:
        embed_small(part.model, part.path, part.root)
        to_raw(part.model)
        repair(part.model, part.path)
        with onnx_refusals(part.path):
            part.model = upgrade(part.model, part.path, files.with_declared)


def _under_one_root(parts: list[ConnectedGraph]) -> Path:
    """The folder above all weights, to which the graphs' references become relative."""
    roots = {part.root for part in parts if part.external} or {parts[0].root}
    common = Path(os.path.commonpath([os.path.abspath(root) for root in roots])) if len(roots) > 1 else roots.pop()
    for part in parts:
        for tensor, reference in references(part.model):
            place = os.path.relpath(os.path.abspath(part.root / reference["location"]), os.path.abspath(common))
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place
    return common


def _subject(model: onnx.ModelProto, root: Path) -> Subject:
    return Subject(model, find_signature(onnx.ModelProto(), need_caches=False), root)  # whatever it is: inputs are drawn
