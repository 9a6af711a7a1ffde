"""A stage's run: whether its results still hold, outputs that appear by rename, and a manifest that says how they came.

Nothing is replaced that the stage itself has not written: its folder's manifest lists that, and while results are moved,
which a kill may interrupt, so does a list in .partial.
"""

import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from suture.core.errors import UserError
from suture.core.identity import Contents, versions
from suture.core.manifest import MANIFEST, MOVING, PARTIAL, hashes, own_names, peak_memory, read_manifest, remove
from suture.core.reader import read_json

LOCK = ".lock"  # in .partial, held by the run that writes there


class Stage:
    """One run of the stage `name` that reads `inputs` with `options` and writes into the folder `out`.

    stage = Stage("surgery", out, inputs=[model, *weights], options={"capacity": 2048}, writes=["report.json"])
    if stage.up_to_date() and not force: return
    with stage.writing() as folder:
        (folder / "report.json").write_text(...)
        stage.extra["weights_root"] = "."

    `name` begins with the package that runs: "validate", "suture.validate.bundle". `writes`: names of files that each run
    writes, so that somebody else's in their places is refused before the work, not after it. `to`: the option that names `out`. Raises
    UserError where an input cannot be read, lies in `out` itself, or where `out` has another stage's results or somebody
    else's files.
    """

    def __init__(self, name: str, out: Path, inputs: list[Path], options: dict, writes: Iterable[str] = (), to: str = "--out"):
        self.name, self.out, self.elsewhere = name, Path(out), f"name another folder with {to}"
        self.inputs = {os.path.relpath(path, self.out): Path(path) for path in inputs}
        self.extra: dict = {}
        self._check_folder()
        self._check_targets([*writes, MANIFEST], self._own(self.out / PARTIAL))
        self.contents = Contents(name.partition(".")[0])
        for folder in sorted({self.out, *(path.parent for path in self.inputs.values())}):
            self.contents.learn(folder)
        self.identity = {
            "stage": name,
            "options": json.loads(json.dumps(options, default=str)),
            "inputs": self._read(),
            "versions": versions(name.partition(".")[0]),
        }

    def up_to_date(self) -> bool:
        """True if the results in `out` came from the same inputs, options and versions, and are all still as they were."""
        manifest = read_manifest(self.out)
        if manifest is None or any(manifest.get(key) != value for key, value in self.identity.items()):
            return False
        names, recorded = own_names(manifest), hashes(manifest)
        same = names == set(manifest["outputs"]) and all(
            (self.out / name).is_file() and self.contents.of(self.out / name)["sha256"] == recorded.get(name) for name in names
        )
        if same:
            self._remember(manifest)
        return same

    def _remember(self, manifest: dict) -> None:
        """Writes down sizes, times and inodes where they have changed and the content has not (a moved folder, a copy), so that
        the next run need not hash large files again. Where that cannot be, nothing is lost."""
        content = self._of_inputs() | {name: self.contents.of(self.out / name) for name in manifest["outputs"]}
        if content != manifest.get("content"):
            with suppress(OSError, UserError), alone(self.out) as partial:
                if read_manifest(self.out) == manifest and not (partial / MOVING).exists():
                    _write_manifest(partial, manifest | {"content": content})
                    os.replace(partial / MANIFEST, self.out / MANIFEST)

    def _of_inputs(self) -> dict[str, dict]:
        return {name: self.contents.of(path) for name, path in self.inputs.items()}

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yields an empty folder; what is in it at the end moves into `out`, and what an earlier run wrote besides goes. On
        an error, or where an input has changed by then, nothing moves and nothing goes."""
        with alone(self.out) as partial:
            own = self._own(partial)
            started = time.monotonic()
            yield partial
            names = [
                path.relative_to(partial).as_posix()
                for path in sorted(partial.rglob("*"))
                if path.is_file() and path not in (partial / LOCK, partial / MOVING)
            ]
            self._check_targets([*names, MANIFEST], own)
            written = {name: self.contents.of(partial / name)["sha256"] for name in names}
            if changed := next((name for name, sha in self._read().items() if sha != self.identity["inputs"][name]), None):
                raise UserError(self.inputs[changed], "has changed since this run began", "run it again")
            self._move(partial, written, own, round(time.monotonic() - started, 3))

    def _read(self) -> dict[str, str]:
        return {name: entry["sha256"] for name, entry in self._of_inputs().items()}

    def _check_folder(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(self.out, "is a file", self.elsewhere)
        folder = self.out.resolve()
        for path in self.inputs.values():
            if folder in (path.parent.resolve(), path.resolve().parent):
                raise UserError(self.out, f"holds {path.name}, which {self.name} reads", self.elsewhere)
        if not os.path.lexists(self.out / MANIFEST):
            return
        manifest = read_manifest(self.out)
        if manifest is None:
            raise UserError(self.out / MANIFEST, f"is no manifest of {self.name}", f"remove it, or {self.elsewhere}")
        if manifest.get("stage") != self.name:
            raise UserError(self.out, f"holds the results of {manifest.get('stage') or 'something else'}", self.elsewhere)

    def _own(self, partial: Path) -> set[str]:
        """What earlier runs of this stage wrote here, the last of them perhaps not all of it."""
        moving = self._moving(partial)  # before and after the manifest, which another run may be about to replace
        return moving | own_names(read_manifest(self.out)) | self._moving(partial)

    def _moving(self, partial: Path) -> set[str]:
        try:
            moving = read_json(partial / MOVING)
        except UserError:  # there is none; or a run was killed while it was written, and nothing had been moved
            return set()
        if moving.get("stage") != self.name:
            raise UserError(self.out, f"holds results of {moving.get('stage')}, which was interrupted", self.elsewhere)
        return own_names(moving)

    def _check_targets(self, names: list[str], own: set[str]) -> None:
        """Raises UserError unless each of the names can be written without replacing what is not this stage's own."""
        inputs = {os.path.abspath(path) for path in self.inputs.values()} | {*map(os.path.realpath, self.inputs.values())}
        folder = self.out.resolve()
        for name in sorted({*names, *own}):
            target = self.out / name
            if not target.parent.resolve().is_relative_to(folder):
                raise UserError(target, f"lies outside {self.out}", self.elsewhere)
            if {os.path.abspath(target), str(target.parent.resolve() / target.name)} & inputs:
                raise UserError(target, f"is an input of {self.name} and would be replaced", self.elsewhere)
        for name in names:
            target = self.out / name
            if target.is_dir() and not target.is_symlink():
                raise UserError(target, "is a folder, where a file is to be written", self.elsewhere)
            above = [parent for parent in Path(name).parents if os.path.lexists(self.out / parent)]
            for place in [Path(name), *(each for each in above if not (self.out / each).is_dir())]:
                if os.path.lexists(self.out / place) and place.as_posix() not in own | {MANIFEST}:
                    raise UserError(self.out / place, f"was not written by {self.name} and would be replaced", self.elsewhere)

    def _move(self, partial: Path, new: dict[str, str], own: set[str], seconds: float) -> None:
        listed = {"stage": self.name, "outputs": sorted({*own, *new})}
        written = {name: self.contents.of(partial / name) for name in new}
        manifest = {
            **self.identity,
            **self.extra,
            "outputs": {name: entry["size"] for name, entry in written.items()},
            "content": self._of_inputs() | written,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(),
        }
        _write_manifest(partial, manifest)  # here as well: where the disk is full, nothing has moved yet
        _write_whole(partial / MOVING, json.dumps(listed))
        (self.out / MANIFEST).unlink(missing_ok=True)  # killed between two renames: the next run starts again
        remove(self.out, own - new.keys())
        for name in new:
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, self.out / name)
        moved = {name: self.contents.moved(partial / name, self.out / name, sha) for name, sha in new.items()}
        _write_manifest(partial, manifest | {"content": self._of_inputs() | moved})
        os.replace(partial / MANIFEST, self.out / MANIFEST)
        (partial / MOVING).unlink()


def _write_manifest(partial: Path, manifest: dict) -> None:
    _write_whole(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _write_whole(path: Path, text: str) -> None:
    """All of the text, or no file."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def alone(out: Path) -> Iterator[Path]:
    """Yields the empty folder `out`/.partial, which no other run has meanwhile. Raises UserError where one has it."""
    partial = out / PARTIAL
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise UserError(partial, "is in the way of what is written there", "remove it")
    for path in (partial / LOCK, partial / MOVING):  # written where they lie: a link would lead out
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(path, "is in the way of what is written there", "remove it")
    lock = FileLock(partial / LOCK, timeout=0.2)
    try:
        _acquire(lock, partial)
        (partial / LOCK).write_text(str(os.getpid()), encoding="utf-8")
        _clear(partial, but=(LOCK, MOVING))
        yield partial
    finally:
        if lock.is_locked:
            _clear(partial, but=(LOCK, MOVING))
            (partial / LOCK).unlink(missing_ok=True)  # while it is held: who waits for it sees that it is no longer there
            lock.release()
        with suppress(OSError):  # where another run has it, or a list of what is to be moved must stay
            partial.rmdir()


def _acquire(lock: FileLock, partial: Path) -> None:
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except FileNotFoundError:  # the run before has just removed the folder
            continue
        except Timeout:
            with suppress(OSError, ValueError):
                process = int((partial / LOCK).read_text(encoding="utf-8"))
                raise UserError(partial.parent, f"process {process} is writing there", "wait for it, or end it") from None
            raise UserError(partial.parent, "another process is writing there", "wait for it, or end it") from None
        return


def _clear(folder: Path, but: tuple[str, ...]) -> None:
    for path in folder.iterdir():
        if path.name in but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
