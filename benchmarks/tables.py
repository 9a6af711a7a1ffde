"""The tables in docs/ that commands make, each between two marks that name its command."""

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
FAMILIES, GRAPHS = DOCS / "families.md", DOCS / "graphs.md"
END = "<!-- end of what it made -->\n"


def put(page: str, command: str, table: str) -> str:
    """The page with another table between the marks of this command."""
    begin = f"<!-- made by {command} -->\n"
    before, rest = page.split(begin)
    return before + begin + table + "\n" + END + rest.split(END, 1)[1]
