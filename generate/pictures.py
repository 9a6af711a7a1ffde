"""Pictures on the command line: one prompt or a file of them, with a picture for the ControlNet, to PNG files."""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from suture.core.errors import UserError
from suture.core.manifest import recorded_option
from suture.core.named import check_results, write_picture
from suture.core.parts import PartFolder
from suture.core.read_pictures import read_picture
from suture.core.reader import parse_json, read_text
from suture.core.typed import Strict, check
from suture.core.weights import load_graph, weight_files, weights_root
from suture.generate.opening import GRAPHS, first_result
from suture.generate.prompts import no_surrogates
from suture.models.pictures import CALLED, CONTROL, NAMES, PictureModel, Wanted
from suture.runtime.networks import in_onnxruntime

BATCH = 4


class Line(Strict):
    """One of --prompts FILE.jsonl."""

    prompt: str
    negative: str | None = None
    control: str | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    picture: str | None = None


@dataclass(frozen=True)
class PictureJob:
    wanted: Wanted
    picture: Path
    where: str
    reads: Path | None  # the control's file


def is_picture_model(parts: tuple[PartFolder, ...]) -> bool:
    return {"unet", "vae_decoder"} <= {part.name for part in parts}


class Pictures:
    def __init__(self, options: argparse.Namespace, parts: tuple[PartFolder, ...]):
        self.options = options
        self.graphs = {part.name: first_result(part.folder, *GRAPHS) for part in parts if part.name in CALLED}
        for name, path in self.graphs.items():
            if path is None:
                raise UserError(options.out / name, "has neither surgery/model.onnx nor export/model.onnx", "run the pipeline")
        recorded = recorded_option(parts[0].folder / "export", "checkpoint")
        self.checkpoint = options.checkpoint or Path(recorded or "")
        if not (options.checkpoint or recorded) or not self.checkpoint.is_dir():
            wrong = "the checkpoint, whose tokenizer and scheduler are needed, is not here"
            raise UserError(options.checkpoint or options.out, wrong, "name it with --checkpoint DIR")
        self.jobs = list(self._jobs())
        self.height, self.width = self._size()
        missing = [name for name in NAMES if name not in self.graphs]
        if missing:
            raise UserError(options.out, f"has no part {missing[0]}", "export the checkpoint again")
        self.model = PictureModel(
            self.checkpoint, {name: in_onnxruntime(path, fast=True) for name, path in self.graphs.items()}
        )
        self._check()
        self.what = f"{', '.join(self.graphs)} of {options.out} in onnxruntime on the CPU"

    def draw(self) -> None:
        """All pictures, as many at once as --batch says. Each is written as soon as it is there."""
        size = self.options.batch or BATCH
        batches = [self.jobs[start : start + size] for start in range(0, len(self.jobs), size)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:  # else an error came after a bar
            task = progress.add_task("generate: steps", total=len(batches) * self.options.steps)
            for jobs in batches:
                wanted = [job.wanted for job in jobs]
                latents = None
                for done in self.model.denoise(wanted, self.height, self.width, self.options.steps, self.options.guidance):
                    latents = done.latents
                    progress.advance(task)
                for job, pixels in zip(jobs, self.model.decode(latents)):
                    write_picture(job.picture, pixels)
                    progress.console.print(f"generate: {job.picture}", markup=False, highlight=False, soft_wrap=True)

    def _jobs(self) -> Iterator[PictureJob]:
        options = self.options
        given = {"negative": options.negative or "", "control": options.control, "seed": options.seed}
        if options.prompts is None:
            yield self._job(options.prompt, options.picture, "--prompt", **given)
            return
        lines = [line for line in read_text(options.prompts, "name a file of prompts, one a line").splitlines() if line.strip()]
        if not lines:
            raise UserError(options.prompts, "has no prompts", "write one a line")
        for number, text in enumerate(lines, 1):
            where = f"{options.prompts}, line {number}"
            line = {"prompt": text}
            if options.prompts.suffix == ".jsonl":
                line = parse_json(text.encode(), where)
                check(line, Line, where, 'write {"prompt": "...", "control": "edges.png", "picture": "out.png"}')
            control = line.get("control")
            control = _below(options.prompts.parent, control, where) if control else options.control
            place = options.picture.with_stem(f"{options.picture.stem}-{number}")
            place = _below(options.picture.parent, line["picture"], where) if line.get("picture") else place
            seed = options.seed + number - 1 if line.get("seed") is None else line["seed"]
            negative = given["negative"] if line.get("negative") is None else line["negative"]
            yield self._job(line["prompt"], place, where, negative, control, seed)

    def _job(self, prompt: str, picture: Path, where: str, negative: str, control: Path | None, seed: int) -> PictureJob:
        no_surrogates([prompt, negative], where)
        if CONTROL in self.graphs and control is None:
            raise UserError(where, "the model has a ControlNet, which needs a picture", "give one with --control EDGES.png")
        if control is not None and CONTROL not in self.graphs:
            raise UserError(where, "has a picture for a ControlNet, and the model has none", "leave it out")
        if picture.suffix.lower() != ".png" or not picture.parent.is_dir():
            raise UserError(picture, "is not a .png file in a folder that there is", "name one, such as out.png")
        return PictureJob(
            Wanted(prompt, negative, None if control is None else np.asarray(read_picture(control)), seed),
            picture,
            where,
            control,
        )

    def _size(self) -> tuple[int, int]:
        """That of --size, or of the controls."""
        sizes = {job.wanted.control.shape[:2] for job in self.jobs if job.wanted.control is not None}
        asked = self.options.size
        if len(sizes | ({asked} if asked else set())) > 1:
            wrong = " and ".join(f"{height}x{width}" for height, width in sorted(sizes))
            remedy = "bring them to one size" if not asked else f"resize it, or leave --size {asked[0]}x{asked[1]} out"
            raise UserError("--control", f"is of {wrong} pixels", remedy)
        return asked or next(iter(sizes), (0, 0))

    def _check(self) -> None:
        if not self.height:
            self.height = self.width = self.model.usual
        self.model.scheduled(self.options.steps)
        self.model.check_size(self.height, self.width, "--size" if self.options.size else "--control")
        read = [
            *self.graphs.values(),
            *(file for path in self.graphs.values() for file in weight_files(load_graph(path), weights_root(path))),
        ]
        read += [self.options.prompts, *(job.reads for job in self.jobs), *self.checkpoint.rglob("*")]
        places = [job.picture for job in self.jobs]
        for job in self.jobs:
            check_results({"--picture": job.picture}, read)
            if places.count(job.picture) > 1:
                raise UserError(job.where, f"writes {job.picture}, as another line does", "name each picture once")
            if more := self.model.left_out(job.wanted.prompt):
                print(f"generate: {job.where}: the last {more} tokens are left out: the text encoder takes "
                      f"{self.model.length}", file=sys.stderr)  # fmt: skip


def _below(folder: Path, name: str, where: str) -> Path:
    """A file that a line of prompts names. Raises UserError for one that is not in the folder: who wrote the line does not say what is
    read and written elsewhere."""
    path = folder / name
    no_surrogates([name], where)
    if "\0" in name or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(where, f"names {name[:100]!r}, which is not in {folder}", "name a file in that folder")
    return path
