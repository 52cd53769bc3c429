"""The one exception for a user's mistake, and the check of numbers given as flags."""


class UserError(Exception):
    """A user's mistake; its message is one line that says what is wrong and how to mend it."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Text, perhaps from a stranger's file -> the same without characters that control a
    terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def at_least(least: int, **flags: int | None) -> None:
    """Check flags by name: each value is None, or from `least` up to 2^31. Raises UserError."""
    for name, value in flags.items():
        if value is not None and not least <= value < 2**31:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least} and below 2^31")
