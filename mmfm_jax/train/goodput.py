"""Goodput of a run: the share of its wall time, since the first start, that went into steps that were kept.

Every line of `metrics.jsonl` carries, as `seconds/KIND`, what passed since the line before it, so the sum over the file
is the wall time since the first start. The kinds in the words of `ml-goodput-measurement` (which needs Google Cloud
Logging, and so is not used): `step` is productive; badput are `init` (TPU initialization, training preparation),
`restore` (checkpoint restore), `compile` (program startup), `data` (data loading, where a step waits for it), `save`
(checkpoint save, where a step waits for it), `validate` (a custom event), `lost` (wasted progress from disruption:
steps taken again after a kill) and `down` (infrastructure recovery from disruption).

Two things are not seen: what a killed process did after its last line counts as `down`, and a line cut at a resume is
`lost` whole, though a checkpoint may stand between it and the line before.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from mmfm_jax.train.clock import Clock

PREFIX = "seconds/"
OF_ACTIVITY = {
    "import": "init", "devices": "init", "store": "init", "init": "init", "restore": "restore", "compile": "compile",
    "data": "data", "validate": "validate", "save": "save",
}  # fmt: skip
"""Kind of each activity of the clock; a step's time is what remains between two lines."""


class Ledger:
    """Where the time went since it was last asked."""

    def __init__(self, clock: Clock):
        self._clock, self._elapsed, self._seconds = clock, 0.0, dict.fromkeys(clock.seconds, 0.0)

    def take(self, rest: str) -> dict[str, float]:
        """Seconds by kind since the last call, at first since the process started; `rest` names what nothing claims."""
        elapsed, seconds = self._clock.elapsed(), dict(self._clock.seconds)
        kinds: dict[str, float] = {}
        for activity, kind in OF_ACTIVITY.items():
            kinds[kind] = kinds.get(kind, 0.0) + seconds[activity] - self._seconds[activity]
        left = max(0.0, elapsed - self._elapsed - sum(kinds.values()))
        kinds[rest] = kinds.get(rest, 0.0) + left
        self._elapsed, self._seconds = elapsed, seconds
        return {kind: value for kind, value in kinds.items() if value > 0}


def spent(lines: Iterable[dict]) -> dict[str, float]:
    """Seconds by kind that lines of `metrics.jsonl` account for."""
    return total(
        *(
            {name.removeprefix(PREFIX): value for name, value in line.items() if name.startswith(PREFIX)}
            for line in lines
        )
    )


def total(*parts: dict[str, float]) -> dict[str, float]:
    """The sum of several accounts, by kind."""
    kinds: dict[str, float] = {}
    for part in parts:
        for kind, value in part.items():
            kinds[kind] = kinds.get(kind, 0.0) + value
    return kinds


def between(lines: list[dict], first: int, started: datetime) -> dict[str, float]:
    """Seconds `lost` and `down` between the lines of earlier starts and one at `started` that goes on at `first`."""
    if not lines:
        return {}
    down = (started - datetime.fromisoformat(lines[-1]["time"])).total_seconds()
    lost = sum(spent(line for line in lines if line["step"] > first).values())
    return {kind: value for kind, value in {"lost": lost, "down": down}.items() if value > 0}


def as_metrics(seconds: dict[str, float]) -> dict[str, float]:
    """`goodput`, and `badput/KIND` for every other kind: shares of the wall time that sum to 1."""
    wall = sum(seconds.values())
    shares = {kind: value / wall for kind, value in seconds.items()} if wall else {}
    badput = {f"badput/{kind}": share for kind, share in shares.items() if kind != "step"}
    return {"goodput": shares.get("step", 0.0)} | badput


def told(seconds: dict[str, float], starts: int) -> str:
    """The one line at the end of a run: goodput, and what took the rest, the largest first."""
    wall = sum(seconds.values())
    shares = as_metrics(seconds)
    rest = sorted(((share, name) for name, share in shares.items() if name != "goodput"), reverse=True)
    badput = ", ".join(f"{name.removeprefix('badput/')} {share:.1%}" for share, name in rest if share >= 0.0005)
    times = "one start" if starts == 1 else f"{starts} starts"
    return f"Goodput {shares['goodput']:.1%} of {duration(wall)} over {times}" + (f"; {badput}." if badput else ".")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
