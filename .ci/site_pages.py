"""A hook of mkdocs: pages that other files of the repository are, and the commands' reference from their own --help.

The files keep links that work in the repository; here a link to another page becomes one, and a link to a source file its text.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # in the repository: on the site
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config) -> Files:
    made = {page: (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](") for source, page in PAGES.items()}
    made["commands.md"] = _commands()
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    return LINK.sub(lambda found: _link(found, files), markdown)


def _link(found: re.Match, files: Files) -> str:
    text, target, anchor = found.groups()
    inside = target.removeprefix("../")
    if "://" in target or files.get_file_from_path(target):
        return found[0]
    if inside in PAGES:
        return f"[{text}]({PAGES[inside]}{anchor or ''})"
    if not (ROOT / inside).exists():
        return found[0]  # mkdocs says that it leads nowhere
    return text


def _commands() -> str:
    """Each command's own --help."""
    from suture.__main__ import COMMANDS

    environment = os.environ | {"COLUMNS": "110", "NO_COLOR": "1"}
    parts = [
        "# Commands\n\nWhat each command says of itself with `--help`. In the repository `python -m suture X`; `python -m X` for the "
        "stages.\n"
    ]
    for name, (_, what) in COMMANDS.items():
        command = [sys.executable, "-m", "suture", name, "--help"]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        parts.append(f"## suture {name}\n\n{what[0].upper()}{what[1:]}.\n\n```text\n{done.stdout.rstrip()}\n```\n")
    return "\n".join(parts)
