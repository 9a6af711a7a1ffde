"""The files of a pipeline's folder that validation reads, part by part."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from suture.core.arrays import LIMIT as NPZ_LIMIT
from suture.core.errors import UserError
from suture.core.manifest import MANIFEST, recorded_file, recorded_folder, recorded_option
from suture.core.parts import DECODER, PARTS, PartFolder, find_parts
from suture.core.reader import status
from suture.core.signature import EMBEDDINGS
from suture.core.weights import MODEL_LIMIT
from suture.models.architectures import open_checkpoint
from suture.models.tokenizer import tokenizer_files


@dataclass(frozen=True)
class PartFiles:
    """What the stages have written of one part; None for what they have not. One that a stage's manifest lists may be gone."""

    part: PartFolder
    exported: Path
    portable: Path | None
    unquantised: Path | None  # the portable graph before it was quantised, where it was
    lowered: Path | None
    engine: Path | None

    @property
    def graphs(self) -> list[Path]:
        files = [self.exported, self.portable, self.unquantised, self.lowered]
        return [path for path in files if path and path.is_file() and path.stat().st_size <= MODEL_LIMIT]

    @property
    def manifests(self) -> list[Path]:
        paths = (self.part.folder / stage / MANIFEST for stage in ("export", "surgery", "build"))
        return [path for path in paths if path.is_file()]

    @property
    def files(self) -> list[Path]:
        described = self.engine and self.engine.with_name("engine.json")
        return [*self.graphs, *(path for path in (self.engine, described) if path and path.is_file()), *self.manifests]


NOT_HERE = "the checkpoint that export/manifest.json names, or its adapter, is not here"


@dataclass(frozen=True)
class Pipeline:
    parts: tuple[PartFiles, ...]  # in the order in which they are called
    checkpoint: Path | None
    text: Path | None
    results: Path | None  # of the bundle's run.py, from a machine with a GPU
    listing: Path | None = None  # parts.json, of a model of several parts
    lora: Path | None = None  # the adapter that was merged into the checkpoint's weights

    @property
    def decoder(self) -> PartFiles | None:
        """The part that writes tokens, where there is one."""
        return next((part for part in self.parts if part.part.kind == DECODER), None)

    @property
    def embed(self) -> Path | None:
        """The graph that makes the decoder's embeddings of tokens, where it takes such."""
        source = self.decoder and self.decoder.part.source(EMBEDDINGS)
        return next((part.exported for part in self.parts if part.part.name == source), None)

    @property
    def graphs(self) -> list[Path]:
        return [path for part in self.parts for path in part.graphs]

    @property
    def files(self) -> list[Path]:
        """All that is read, but the graphs' weights."""
        files = [path for part in self.parts for path in part.files]
        files += [path for path in (self.text, self.results, self.listing) if path]
        if self.checkpoint:
            files += tokenizer_files(self.checkpoint)
            with suppress(UserError):  # the level that reads it says what is wrong with it
                files += open_checkpoint(self.checkpoint, self.lora).files
        return list(dict.fromkeys(files))


def find_pipeline(folder: Path, text: Path | None, results: Path | None = None) -> Pipeline:
    """Raises UserError where a part has no exported graph, or `text` is not a file."""
    parts = tuple(_files(part) for part in find_parts(folder))
    if text is not None and not text.is_file():
        raise UserError(text, "no such file", "name a text file with --text")
    if results is not None and status(results).st_size > NPZ_LIMIT:  # before it is hashed
        raise UserError(results, f"has more than {NPZ_LIMIT:,} bytes", "name the results.npz that the bundle's run.py wrote")
    export = parts[0].part.folder / "export"
    checkpoint, lora = (recorded_folder(export, name) for name in ("checkpoint", "lora"))
    if lora is None and recorded_option(export, "lora") is not None:
        checkpoint = None  # alone it is not what was exported
    heldout = checkpoint / "heldout.txt" if checkpoint else None
    return Pipeline(
        parts,
        checkpoint=checkpoint,
        text=text or (heldout if heldout and heldout.is_file() else None),
        results=results,
        listing=recorded_file(folder, PARTS),
        lora=lora,
    )


def _files(part: PartFolder) -> PartFiles:
    folder = part.folder
    exported = recorded_file(folder / "export", "model.onnx")
    if exported is None:
        raise UserError(folder, "has no export/model.onnx", "name the --out folder of pipeline.py, or two .onnx files")
    if recorded_file(folder / "surgery", "once.onnx"):
        raise UserError(
            folder / "surgery", "was made with --once", "its report.json has the proof; run surgery without it for the rest"
        )
    return PartFiles(
        part,
        exported,
        portable=recorded_file(folder / "surgery", "model.onnx"),
        unquantised=recorded_file(folder / "surgery", "float/model.onnx"),
        lowered=recorded_file(folder / "surgery", "model.trt.onnx"),
        engine=recorded_file(folder / "build", "model.engine"),
    )
