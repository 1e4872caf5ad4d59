"""A lock for the serving loop: threads get it in the order in which they ask for it."""

from __future__ import annotations

import threading


class Turns:
    """A context manager that one thread at a time enters, in the order of the calls.

    `threading.Lock` would let a thread that steps in a loop keep all others waiting. It is not reentrant.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = 0
        self._serving = 0
        self._given_up: set[int] = set()
        self._holder: int | None = None

    @property
    def mine(self) -> bool:
        """Whether the calling thread is inside."""
        return self._holder == threading.get_ident()

    def __enter__(self) -> None:
        with self._changed:
            ticket = self._next
            self._next += 1
            try:
                while self._serving != ticket:
                    self._changed.wait()
            except BaseException:  # an interrupt: later threads must not wait for this one
                if self._serving == ticket:
                    self._advance()
                else:
                    self._given_up.add(ticket)
                raise
            self._holder = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._holder = None
            self._advance()

    def _advance(self) -> None:
        self._serving += 1
        while self._serving in self._given_up:
            self._given_up.remove(self._serving)
            self._serving += 1
        self._changed.notify_all()
