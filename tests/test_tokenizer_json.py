"""tokenizer.json of Qwen's tiktoken vocabulary: the same ids as tiktoken's, for text and for conversations."""

from pathlib import Path

import pytest
from test_tokenizer import SHARED, TEXTS, needs_real

from suture.models.library_tokenizer import LibraryTokenizer
from suture.models.named import checkpoint_folder
from suture.models.tokenizer import SPECIALS, open_tokenizer
from suture.models.tokenizer_json import FILES, write_library_files

ROOT = Path(__file__).parents[1]
SOURCES = ("README.md", "surgery/graph/graph.py", "docs/performance.md", "docs/surgery.md")
MESSAGES = [
    {"role": "user", "content": " 你好 \n"},
    {"role": "assistant", "content": "  hello there \n"},
    {"role": "user", "content": "and\u0301 now?"},
]


def both(source: Path, folder: Path):
    write_library_files(source, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return open_tokenizer(source), LibraryTokenizer(folder)


def same(own, library) -> None:
    texts = [*TEXTS.values(), *((ROOT / name).read_text(encoding="utf-8") for name in SOURCES)]
    counted = 0
    for text in texts:
        ids = own.encode(text)
        assert library.encode(text) == ids
        assert library.decode(ids) == own.decode(ids)
        counted += len(ids)
    assert counted > 5000
    assert library.size == own.size
    for token in SPECIALS:
        assert library.encode(token) == own.encode(token, allow_special="all")
    for messages in (MESSAGES, MESSAGES[:1], [{"role": "system", "content": "Be brief."}, *MESSAGES]):
        assert library.chat(messages) == own.chat(messages)
    assert library.stop_ids(chat=True) == {own.im_end}


def test_of_tiny_qwen(tmp_path):
    same(*both(checkpoint_folder("tiny-qwen"), tmp_path))


@needs_real
@pytest.mark.slow
def test_of_qwens_own(tmp_path):
    same(*both(SHARED, tmp_path))


def test_export_writes_it(tiny_export):
    assert all((tiny_export / name).is_file() for name in FILES)
    assert LibraryTokenizer(tiny_export).encode("def main():") == open_tokenizer(checkpoint_folder("tiny-qwen")).encode(
        "def main():"
    )
