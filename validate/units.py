"""Numbers as the report shows them."""


def error_text(error: float | None) -> str:
    if error is None:
        return "not a number"
    return "0" if error == 0 else f"{error:.1e}".replace("e-0", "e-").replace("e+0", "e")


def size_text(size: int | None) -> str:
    if size is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000


def duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
