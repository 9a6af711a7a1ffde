"""Text files are UTF-8 whatever the locale: every read_text, write_text and open for text says so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", "suture", "export", "surgery", "build", "validate", "models", "runtime", "generate")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))] + [ROOT / "suture/pipeline.py"]


def unspecified(source: str) -> list[int]:
    """The lines of calls that take the locale's encoding."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and _by_locale(node)]


def _by_locale(call: ast.Call) -> bool:
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in ("read_text", "write_text")
    if not isinstance(call.func, ast.Name) or call.func.id != "open":
        return False
    mode = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else "r"
    return "b" not in str(mode)


@pytest.mark.seconds
def test_every_text_file_is_utf8():
    assert len(FILES) > 100
    found = {str(path.relative_to(ROOT)): unspecified(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("code", ["p.read_text()", "p.write_text('a')", "open('a')", "open('a', 'w')"])
def test_what_takes_the_locales_encoding_is_seen(code):
    assert unspecified(code) == [1]


@pytest.mark.parametrize("code", ["p.read_text(encoding='utf-8')", "open('a', 'rb')", "open('a', 'w', encoding='utf-8')"])
def test_what_says_its_encoding_is_not(code):
    assert unspecified(code) == []
