"""How fast a run trains, beside what its devices could do."""

from __future__ import annotations

from jax.sharding import Mesh

from mmfm_jax.train.clock import Clock
from mmfm_jax.train.flops import peak_flops

PAUSES = ("compile", "validate", "save")
LEAST = 4  # steps of a reading: one under way at its start counts whole


class Meter:
    """Speed between two readings, without what compiling, validating and saving took.

    While a run pauses for these, batches are read ahead, and the steps after it do not wait for theirs. So that they do
    not seem faster than the run is, a pause counts as far as it spared such waiting.
    """

    def __init__(self, batch_size: int, flops: float, mesh: Mesh, ahead: int):
        """`ahead`: batches that are read ahead at most."""
        self._batch_size, self._flops, self._ahead = batch_size, flops, ahead
        peak = peak_flops(mesh.devices.flat[0])
        self._peak = peak and peak * mesh.size

    def start(self, ended: int, clock: Clock) -> None:
        """From here on it counts; `ended` is the newest step that has ended, and all batches are read ahead."""
        self._began_with = self._ahead  # batches that the first reading does not wait for
        self._spared, self._wait, self._interval = 0.0, 0.0, 0.0
        self._count_from(ended, clock)

    def _count_from(self, ended: int, clock: Clock) -> None:
        self._ended, self._time, self._seconds = ended, clock.elapsed(), dict(clock.seconds)

    def read(self, ended: int, clock: Clock) -> dict[str, float]:
        """Since the last reading, or nothing where too few steps have ended since.

        `ended` is the newest step that has ended, not the one whose metrics are read: metrics of several steps are read
        at once before a validation, and then a step would seem to take no time.
        """
        steps = ended - self._ended
        if steps < LEAST + self._began_with:
            return {}
        spent = {name: clock.seconds[name] - self._seconds[name] for name in clock.seconds}
        pause = sum(spent[name] for name in PAUSES)
        busy = clock.elapsed() - self._time - pause
        spared = self._spared_in(steps, busy, pause, spent["data"])
        busy, wait = busy + spared, spent["data"] + spared
        self._interval, self._wait = busy / steps, wait / steps
        self._count_from(ended, clock)
        rate = steps / busy
        speed = {
            "samples_per_second": rate * self._batch_size,
            "data_wait": wait / busy,
            "model_tflops_per_second": rate * self._flops / 1e12,
        }
        return speed | ({"mfu": rate * self._flops / self._peak} if self._peak else {})

    def _spared_in(self, steps: int, busy: float, pause: float, waited: float) -> float:
        """Seconds of waiting for data that pauses spared these steps.

        Batches in hand spare what reading them takes: an interval between two steps each, where steps wait for data.
        """
        if self._began_with:
            read = steps - self._began_with
            self._began_with = 0
            return busy / read * (steps - read) if waited else 0.0
        self._spared = min(self._ahead * self._interval, self._spared + pause)
        paid = min(self._spared, max(0.0, steps * self._wait - waited))
        self._spared -= paid
        return paid
