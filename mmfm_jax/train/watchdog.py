"""Says when a run stopped making progress, and which process keeps the others waiting.

Every process tells the others now and then how far it is, through the key-value store of `jax.distributed`: one small
write of each process every tenth of `train.stall_minutes` (a minute at most), to a server that holds it in memory. At
512 hosts and ten minutes that is 9 writes a second, fewer than the heartbeats the server answers anyway; files in a
run folder would cost the shared file system as many, and a listing. Nothing is read until the reader's own steps stand
still, and only the first process reads.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from mmfm_jax.files import open_own
from mmfm_jax.train.clock import Clock

STALLS = "stalls"
KEY = "mmfm/progress"
MOST_NAMED = 8


@dataclass(frozen=True)
class Report:
    """How far a process is."""

    beat: int
    """Reports before this one; a process whose beat stands still is stopped, gone or cut off."""
    begun: int
    """Newest step given to the device."""
    ended: int
    """Newest step whose metrics were read."""
    activity: str

    def encode(self) -> str:
        return f"{self.beat} {self.begun} {self.ended} {self.activity}"

    @classmethod
    def decode(cls, text: str) -> Report:
        beat, begun, ended, activity = text.split(" ", 3)
        return cls(int(beat), int(begun), int(ended), activity)


class Watchdog:
    """Watches the steps of this process from a thread of its own, and on the first process those of the others."""

    def __init__(self, run: Path, stall_minutes: float, first: int, clock: Clock, tell: Callable[[str], None]):
        """`tell` prints one line."""
        self._run, self._stall, self._clock, self._tell = run, 60 * stall_minutes, clock, tell
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._begun = self._ended = first
        self._since, self._beat = time.monotonic(), 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def begins(self, step: int) -> None:
        """A step was given to the device."""
        self._begun = step

    def ended(self, step: int) -> None:
        """A step ended, or what was done between two steps did."""
        self._ended, self._since = step, time.monotonic()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        earlier: dict[int, Report] = {}
        told = 0  # times of this stall
        while not self._closing.wait(min(60.0, self._stall / 10)):
            self._publish()
            still = time.monotonic() - self._since
            if still < self._stall / 2:
                earlier, told = {}, 0
            elif not earlier:
                earlier = self._read()  # to see at the full time whose beat stood still
            if still >= (told + 1) * self._stall:
                told += 1
                if told == 1:
                    self._dump_stacks()
                self._tell(self._sentence(still, earlier))

    def _publish(self) -> None:
        self._beat += 1
        store = _store()
        if store is not None:
            mine = Report(self._beat, self._begun, self._ended, self._clock.activity)
            try:
                store.key_value_set(f"{KEY}/{self._process}", mine.encode(), allow_overwrite=True)
            except Exception:  # the first process is gone; JAX itself ends this one soon
                return

    def _read(self) -> dict[int, Report]:
        """What every process reported last; {} on all but the first process."""
        store = _store()
        if store is None or self._process:
            return {}
        try:
            found = store.key_value_dir_get(KEY)
        except Exception:  # as above: nothing to report is no reason to stop a run
            return {}
        return {int(key.rpartition("/")[2]): Report.decode(text) for key, text in found}

    def _sentence(self, still: float, earlier: dict[int, Report]) -> str:
        start = f"No step ended for {_minutes(still)} on process {self._process}"
        where = f"after step {self._ended}, in {self._clock.activity}"
        stacks = f"Python stacks are in the run's folder {STALLS}/."
        blame = blamed(earlier, self._read(), self._processes)
        return f"{start} ({where}){f': {blame}' if blame else ''}. {stacks}"

    def _dump_stacks(self) -> None:
        """Appends the Python stacks of all threads to the run's folder, without the folders that the code lies in."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = re.sub(r'File "([^"]*)"', lambda found: f'File "{_within_path(found[1])}"', file.read())
        try:
            (self._run / STALLS).mkdir(exist_ok=True)
            path = self._run / STALLS / f"process-{self._process}.txt"
            with os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "a") as file:
                file.write(f"After step {self._ended}, in {self._clock.activity}:\n{stacks}\n")
        except OSError as error:  # a file system that is gone may be why nothing moves; the line still goes out
            self._tell(f"{self._run / STALLS}: the stacks could not be written ({error.strerror or error}).")


def blamed(earlier: dict[int, Report], now: dict[int, Report], processes: int) -> str:
    """Which processes keep the rest waiting: those that give no sign of life, else those a step behind.

    `earlier` and `now` are what the processes had reported at two times further apart than two reports.
    """
    if not now or processes == 1:
        return ""
    silent = [p for p in range(processes) if p not in now or (p in earlier and earlier[p].beat == now[p].beat)]
    if silent:
        return f"{_names(silent, now)} no sign of life"
    furthest = max(report.begun for report in now.values())
    behind = [p for p, report in sorted(now.items()) if report.begun < furthest]
    if behind:
        return f"{_names(behind, now)} not begun step {furthest}"
    return f"all {processes} processes wait in step {furthest}"


def _names(processes: list[int], reports: dict[int, Report]) -> str:
    def name(process: int) -> str:
        report = reports.get(process)
        return (
            f"{process} (after step {report.ended}, in {report.activity})" if report else f"{process} (never heard of)"
        )

    named = ", ".join(name(process) for process in processes[:MOST_NAMED])
    more = f" and {len(processes) - MOST_NAMED} more" if len(processes) > MOST_NAMED else ""
    return f"process {named} has" if len(processes) == 1 else f"processes {named}{more} have"


def _store():
    """The key-value store that the processes of a run share, None where there is one process.

    JAX has no public name for it; orbax uses this one too.
    """
    from jax._src import distributed

    return distributed.global_state.client


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _within_path(file: str) -> str:
    """A module's file without the folder on `sys.path` that it was found in."""
    roots = [root for root in sys.path if root and file.startswith(f"{root}/")]
    return file[len(max(roots, key=len)) + 1 :] if roots else Path(file).name
