"""A run that is told to stop saves first."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
NOTICE = "a preemption notice to the run"
OUTCOME = "MMFM_OUTCOME"


class StopSignal:
    """SIGTERM or SIGINT (Ctrl-C), as a question to ask after each step; all processes of a run get the same answer at
    the same step.

    With `leave`, of a process that is ours to end: a signal before `begins`, when there is nothing to save, and a
    second one call it, from a thread, for Python's own handlers wait until a program is compiled. Without, a second one
    raises KeyboardInterrupt. Where SIGINT is ignored, as in the background of a script, it stays so. Outside the main
    thread nothing is heard.
    """

    def __init__(self, leave: Callable[[signal.Signals, bool], None] | None = None):
        """`leave`: of a signal, and whether steps were taken that are not saved."""
        self._leave = leave
        self.cause: str | None = None
        """Name of the signal that was heard first, or `NOTICE`; None while the run may go on."""
        self._begun = leave is None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            return self
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        if in_group():  # JAX hears SIGTERM there, for all processes
            heard = [number for number in heard if number is not signal.SIGTERM]
        if self._leave:
            self._ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            self._theirs, self._wakeup = theirs, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
        handler = self._ignore if self._leave else self._remember
        self._before = {number: signal.signal(number, handler) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        if not self._before:
            return
        for number, before in self._before.items():
            if number is signal.SIGINT or not in_group():
                signal.signal(number, before)
        if self._leave:
            signal.set_wakeup_fd(self._wakeup)
            self._theirs.close()  # which ends the thread

    def begins(self) -> None:
        """From here on there are steps to save."""
        self._begun = True

    def reached(self, step: int) -> bool:
        """Whether the run is to end after this step."""
        if not in_group():
            return self.cause is not None
        from jax.experimental import multihost_utils

        stops = multihost_utils.reached_preemption_sync_point(step)
        if stops and self.cause is None:
            self.cause = NOTICE
        return stops

    def _ignore(self, *_) -> None:
        """The thread has heard it."""

    def _remember(self, number: int, _) -> None:
        if self.cause is not None:
            raise KeyboardInterrupt
        self._heard(signal.Signals(number))

    def _listen(self) -> None:
        assert self._leave
        while byte := self._ours.recv(1):
            number = signal.Signals(byte[0])
            if number not in SIGNALS:
                continue
            alone = not in_group()
            if self.cause is None and (self._begun or not alone):
                self._heard(number)
            else:
                self._leave(number, self._begun)

    def _heard(self, number: signal.Signals) -> None:
        self.cause = number.name
        _say(f"{number.name}: saves after the step under way and stops; a second signal leaves at once.")
        if in_group():
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the other processes


def in_group() -> bool:
    """Whether this process is one of several of a run."""
    state = getattr(sys.modules.get("jax._src.distributed"), "global_state", None)
    return state is not None and state.client is not None


def leave(number: signal.Signals, begun: bool) -> None:
    """Ends this process where it stands, as by the signal: what is being compiled cannot be interrupted."""
    tell_launcher("stopped")
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    lost = (
        "left at once, without what the newest checkpoint lacks"
        if begun
        else "left before the first step; nothing is lost"
    )
    _say(f"{number.name}: {lost}; the same command goes on from the newest checkpoint, if there is one.")
    os._exit(128 + number)


def tell_launcher(outcome: str) -> None:
    """`finished` or `stopped`, in the file that a launcher names: a run ends with status 0 either way."""
    if file := os.environ.get(OUTCOME):
        Path(file).write_text(f"{outcome}\n")


def _say(line: str) -> None:
    print(f"mmfm: {line}", file=sys.stderr, flush=True)
