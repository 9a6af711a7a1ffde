"""python .ci/package_contents.py WHEEL SDIST: what git tracks of the package is in both, and nothing else is in the wheel."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(wheel: str, sdist: str) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    expected = {
        f"{package.replace('.', '/')}/{file.removeprefix(f'{folder}/')}"
        for package, folder in folders.items()
        for file in tracked
        if file.startswith(f"{folder}/")
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    lacking = sorted(expected - packed), sorted(packed - expected), sorted(set(tracked) & IN_SDIST - sources)
    for names, what in zip(lacking, ("missing from the wheel", "in the wheel but not tracked", "missing from the sdist")):
        if names:
            sys.exit(f"package: {what}: {', '.join(names)}")
    print(f"package: {len(packed)} files in the wheel, as tracked")


IN_SDIST = {"LICENSE", "NOTICE", "README.md", "pyproject.toml", "setup.cfg", "requirements.txt", "requirements-dev.txt"}


if __name__ == "__main__":
    main(*sys.argv[1:])
