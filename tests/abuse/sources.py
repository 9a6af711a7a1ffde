"""The good inputs, made once, and each case run on a copy of them."""

import shutil
from pathlib import Path

from filelock import FileLock

from tests.abuse import good, good_pictures
from tests.abuse.case import FINISHED, NO_TRACE, PICTURED, Case, Result, broken_promises, contents
from tests.abuse.server import Server


class Sources:
    """Folders below `folder`, which several processes may share."""

    def __init__(self, folder: Path, server: Server):
        self.folder, self.server = folder, server

    def of(self, case: Case) -> Path:
        """What the case damages a copy of."""
        return self.finished(case.stage) if case.finished else self.good(case.stage)

    def good(self, stage: str) -> Path:
        """The good inputs; those of the stages that read or write pictures are others."""
        return self._once("pictures", good_pictures.make) if stage in PICTURED else self._once("inputs", good.make)

    def finished(self, stage: str) -> Path:
        """The good inputs with the stage's results in `out`."""

        def make(folder: Path) -> None:
            shutil.copytree(self.good(stage), folder, dirs_exist_ok=True)
            fault = NO_TRACE if stage == "export" else None
            case = Case(0, stage, "good", "", lambda folder: None, more=FINISHED.get(stage, ()), fault=fault)
            result = self.server.run(case, folder)
            if result.status != 0:
                raise RuntimeError(f"{stage} does not take the good inputs: {result.err}")

        return self._once(f"after-{stage}", make)

    def run(self, case: Case, work: Path) -> tuple[list[str], Result]:
        """What the case shows to be broken, in the folder `work`, which is made, and how the stage ended."""
        shutil.copytree(self.of(case), work, symlinks=True)
        case.damage(work)
        before = contents(work)
        result = self.server.run(case, work)
        broken = broken_promises(case, result, before, contents(work))
        if wrong := case.after(work):
            broken.append(wrong)
        return broken, result

    def _once(self, name: str, make) -> Path:
        folder = self.folder / name
        with FileLock(f"{folder}.lock"):
            if not (done := self.folder / f"{name}.done").exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it made it
                folder.mkdir()
                make(folder)
                done.touch()
        return folder
