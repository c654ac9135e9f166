"""Errors for the user, printed as one line each, with their exit codes."""


class MosError(Exception):
    """An error that the user can act upon; the command line prints it without a traceback."""

    exit_code = 1


class UsageError(MosError):
    """An option or a setting is invalid."""

    exit_code = 2


class InputError(MosError):
    """A file or a prompt given by the user is missing, damaged or of the wrong kind."""

    exit_code = 3


class ModelError(MosError):
    """A model is unknown, cannot be reached, or does not match its hash."""

    exit_code = 4


class MemoryLimitError(MosError):
    """The device ran out of memory."""

    exit_code = 5


class DeviceError(MosError):
    """The requested device does not exist or cannot be used."""

    exit_code = 6


class DivergenceError(MosError):
    """A training run's loss or weights are no longer numbers, or far above where they began."""

    exit_code = 8


PARTLY_FAILED = 7
INTERRUPTED = 130
OUTPUT_CLOSED = 141
"""As the shell reports a process that SIGPIPE ended: what read the output has stopped, as `head` does."""
