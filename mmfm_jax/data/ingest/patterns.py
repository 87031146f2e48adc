"""Regular expressions of a description, for a limited time each: one that backtracks may not end in a life."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mmfm_jax.errors import UserError

SECONDS = 2.0
"""For one match, which takes microseconds."""


def fullmatch(pattern: str | re.Pattern[str], text: str) -> re.Match[str] | None:
    """`re.fullmatch`. Raises UserError when it takes too long."""
    with _limited(pattern):
        return re.fullmatch(pattern, text)


def search(pattern: str | re.Pattern[str], text: str) -> re.Match[str] | None:
    """`re.search`. Raises UserError when it takes too long."""
    with _limited(pattern):
        return re.search(pattern, text)


def compiles(pattern: str) -> re.Pattern[str]:
    """The compiled pattern. Raises ValueError for what is none."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from error


@contextmanager
def _limited(pattern: str | re.Pattern[str]) -> Iterator[None]:
    """Python's matching asks for signals now and then; other threads than the main one have none, and no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_) -> None:
        said = (pattern if isinstance(pattern, str) else pattern.pattern)[:100]
        raise UserError(
            f"the pattern {said!r} takes more than {SECONDS:g} s on one name; write it without repeats within repeats"
        )

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
