"""SIGTERM and Ctrl-C: training ends its update, saves a checkpoint and stops; everything else stops at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

_asked: int | None = None
_patient = False


class Interrupted(KeyboardInterrupt):
    """The command was asked to stop.

    Attributes:
        signum: by which signal.
    """

    def __init__(self, signum: int, what: str = "stopped") -> None:
        self.signum = signum
        super().__init__(f"{what} by {signal.Signals(signum).name}")


def asked() -> int | None:
    """The signal that asked training to stop, if one has."""
    return _asked


def listen() -> None:
    """Handle both signals in this process from now on; only its main thread can."""
    global _asked
    _asked = None
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, _on_signal)


@contextmanager
def _not_swallowed() -> Iterator[None]:
    """Within, a signal that came while the interpreter ran a destructor or a callback is sent again.

    What these raise is reported and dropped, `Interrupted` as well, and the command would go on to its end.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, Interrupted):
            again = threading.Timer(0.05, os.kill, (os.getpid(), unraisable.exc_value.signum))
            again.daemon = True
            again.start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _on_signal(signum: int, frame: FrameType | None) -> None:
    global _asked
    if not _patient or _asked is not None:
        raise Interrupted(signum)
    _asked = signum
    print(  # noqa: T201
        f"{signal.Signals(signum).name}: this update is ended and saved; once more stops at once", file=sys.stderr
    )


@contextmanager
def patiently() -> Iterator[None]:
    """Within, a first signal is noted instead of raised: `asked` tells."""
    global _patient
    before, _patient = _patient, True
    try:
        yield
    finally:
        _patient = before


def in_one_line(command: Callable[..., int]) -> Callable[..., int]:
    """A command of the terminal that ends in one line when a signal stops it, with the exit code shells expect."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> int:
        listen()
        try:
            with _not_swallowed():
                return command(*args, **kwargs)
        except Interrupted as stop:
            print(f"rto: {stop}", file=sys.stderr)  # noqa: T201
            return 128 + stop.signum
        except BrokenPipeError:  # whoever read the output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush has a place to go
            return 128 + signal.SIGPIPE

    return run
