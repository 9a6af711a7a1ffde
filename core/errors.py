"""The one exception that means: the user can correct this."""


class UserError(Exception):
    """Unusable input or arguments. One line: which input, what is wrong with it, what to do. Exit status 2."""

    def __init__(self, where: object, wrong: str, remedy: str):
        super().__init__(one_line(f"{where}: {wrong}; {remedy}"))
        self.parts = where, wrong, remedy

    def __reduce__(self):  # so that a child process can raise it in its parent
        return type(self), self.parts


def one_line(text: str) -> str:
    """The text without line breaks, and with its other control characters and lone surrogates spelled out: names come
    from files, and a terminal obeys what is in them."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
