"""How a command ends that cannot go on: one line and an exit code."""


class CommandError(Exception):
    """One line for standard error, the exit code, and details that follow it where they were asked for."""

    def __init__(self, message: str, code: int, details: str = "") -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))
        self.code = code
        self.details = details
