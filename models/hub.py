"""A checkpoint named by its repository on the Hugging Face Hub, ORG/NAME: the snapshot in the cache, fetched where it is not there.

Only configurations, tokenizers and safetensors are fetched. No code of a repository is, and none runs.
"""

import re
from pathlib import Path

from suture.core.errors import UserError
from suture.core.refusals import said

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja")
REMEDY = "name a folder, or a repository that this machine can reach or has in its cache"


def folder_of(checkpoint: Path) -> Path:
    """The folder itself where there is one, else the repository's of that name. Raises UserError where it is neither in the cache
    nor to be had."""
    name = str(checkpoint)
    if checkpoint.exists() or not REPOSITORY.fullmatch(name):
        return checkpoint
    from huggingface_hub import snapshot_download  # here: a folder needs nothing of it
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))
        except LocalEntryNotFoundError:
            print(f"export: {name} is no folder here and not in the cache: asking the Hugging Face Hub for it", flush=True)
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # no such name, no network, a broken cache: the library has an error of its own for each
        raise UserError(f"--checkpoint {name}", f"is no folder, and cannot be fetched ({said(error)})", REMEDY) from None
