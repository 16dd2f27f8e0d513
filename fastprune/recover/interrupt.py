"""Ctrl-C and SIGTERM while a stage trains: it stops between two steps, with its state saved."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger("fastprune")


class Stopped(KeyboardInterrupt):
    """The first signal, where it is heeded at once."""


class Interrupt:
    """Within its block the first signal sets `asked`, a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self._at_once = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """The block changes nothing that a signal must not leave half done: the first one raises
        Stopped, also where it came before the block."""
        self._at_once = True
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or self._at_once:
            raise KeyboardInterrupt if again else Stopped
        log.warning("stopping after this step; the state will be saved (again: at once)")
