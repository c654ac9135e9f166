"""What a command printed."""

from typer.testing import Result


def errors(result: Result) -> list[str]:
    """The lines on stderr but for the notice that a tower is being fetched."""
    return [line for line in result.stderr.splitlines() if not line.startswith("fetching")]
