"""SIGINT and SIGTERM: work ends in order, and with the exit code that a shell expects."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end.

    Attributes:
      signum: Which.
      place: How far the work came, all of which is kept; empty if it was stopped anywhere.
    """

    def __init__(self, signum: int, *, place: str = ""):
        after = f" after {place}; go on with --resume" if place else ""
        super().__init__(f"stopped by {signal.Signals(signum).name}{after}")
        self.signum = signum
        self.place = place

    def at(self, place: str) -> "Interrupted":
        """The same, saying how far the work came."""
        return Interrupted(self.signum, place=place)

    @property
    def exit_code(self) -> int:
        """As a shell gives it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class StopRequest:
    """Whether a signal came that is to be followed at the next good moment.

    Attributes:
      signum: Which; 0 as long as none came.
      agree_fn: What this process knows to what all of them follow, at the same call.
    """

    signum: int = 0
    agree_fn: Callable[[int], int] | None = None

    def check(self) -> None:
        """Raises `Interrupted` if a signal came, and all processes agree."""
        signum = self.signum if self.agree_fn is None else self.agree_fn(self.signum)
        if signum:
            raise Interrupted(signum)

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with a `check` before each."""
        for item in items:
            self.check()
            yield item


@contextmanager
def raised_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted` where the program stands.

    Yields:
      Nothing. Outside of the main thread, which alone receives signals, nothing changes.
    """

    def handle(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    with _handled_by(handle):
        yield


@contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """The first SIGINT or SIGTERM is noted, to be followed where that is safe; a second one kills.

    Yields:
      The request, to be checked now and then.
    """
    request = StopRequest()

    def handle(signum: int, frame: FrameType | None) -> None:
        request.signum = signum
        # Nothing is half-written by a process that dies at once.
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    with _handled_by(handle):
        yield request


@contextmanager
def _handled_by(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)
