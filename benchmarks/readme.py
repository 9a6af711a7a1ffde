"""The README's tables that commands make, each between two marks that name its command."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
END = "<!-- end of what it made -->\n"


def put(readme: str, command: str, table: str) -> str:
    """The README with another table between the marks of this command."""
    begin = f"<!-- made by {command} -->\n"
    before, rest = readme.split(begin)
    return before + begin + table + "\n" + END + rest.split(END, 1)[1]
