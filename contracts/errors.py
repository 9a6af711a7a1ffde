"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Unusable input or arguments. One line: which input, what is wrong with it, what to do. Exit status 2."""

    def __init__(self, where: object, wrong: str, remedy: str):
        super().__init__(f"{where}: {wrong}; {remedy}".replace("\n", " "))
        self.parts = where, wrong, remedy

    def __reduce__(self):  # so that a child process can raise it in its parent
        return UserError, self.parts
