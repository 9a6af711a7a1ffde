"""A checkpoint named by its repository: found in the cache without a network, or one line."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from suture.core.errors import UserError
from suture.models.architectures import open_checkpoint
from suture.models.hub import folder_of
from suture.models.named import checkpoint_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as the library lays it out: files are links into blobs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--suture--tiny-qwen"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in filter(lambda file: file.is_file(), checkpoint_folder("tiny-qwen").iterdir()):
        shutil.copy(file, repository / "blobs" / f"{file.name}-etag")
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}-etag")
    return snapshot


def test_a_repository_in_the_cache_is_found(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = folder_of(Path("suture/tiny-qwen"))
    assert found == cache
    assert open_checkpoint(found).tensors.keys() == open_checkpoint(checkpoint_folder("tiny-qwen")).tensors.keys()


def test_a_folder_goes_before_a_repository_of_its_name(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("suture/tiny-qwen")
    own.mkdir(parents=True)
    assert folder_of(own) == own


@pytest.mark.parametrize(
    "name", ["suture/no-such-model", "../elsewhere", "one", "a/b/c", "a--b/c", "a..b/c", "a/b.git", "a./b", "a/" + "n" * 100]
)
def test_what_is_neither_is_said_in_one_line(cache, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        open_checkpoint(folder_of(Path(name)))
    assert "\n" not in str(refused.value)
    assert name in str(refused.value)


@pytest.mark.parametrize("broken", ["no text", "a folder", "no commit"])
def test_a_cache_that_is_broken_is_said_in_one_line(cache, tmp_path, monkeypatch, broken):
    monkeypatch.chdir(tmp_path)
    reference = cache.parents[1] / "refs" / "main"
    reference.unlink()
    reference.mkdir() if broken == "a folder" else reference.write_bytes(b"\xff\xfe" if broken == "no text" else b"0" * 40)
    with pytest.raises(UserError, match="cannot be fetched"):
        folder_of(Path("suture/tiny-qwen"))
