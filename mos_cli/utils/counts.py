"""Numbers of things, in words."""


def counted(number: int, noun: str) -> str:
    """A number with its noun, which takes an -s unless there is one of it: "1 file", "2 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
