"""The `mos` command, also as `python -m mos_cli`, for launchers that start modules (`accelerate launch -m mos_cli`)."""

import signal
import sys


def main() -> None:
    """Entry point of the `mos` script.

    While modules are imported, and when the work is done, Ctrl-C ends the process at once: there is nothing to tidy,
    and an exception in the middle of an import would end in a traceback.
    """
    # A process started in the background by a shell ignores Ctrl-C, and goes on doing so.
    interruptible = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mos_cli.cli.app import run

    try:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:
        from mos_cli.errors import INTERRUPTED

        sys.exit(INTERRUPTED)
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
