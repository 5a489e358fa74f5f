"""Signals that ask a process to end: the first is handled at the next good moment, a second ends the process."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stopping(stop: Callable[[int], None]) -> Iterator[None]:
    """Inside, a first SIGTERM or SIGINT calls `stop` with its number; the process continues (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def first(number: int, frame: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])  # a second one ends the process as ever
        stop(number)

    for number in before:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
