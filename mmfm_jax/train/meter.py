"""How fast a run trains, beside what its devices could do."""

from __future__ import annotations

import time

from jax.sharding import Mesh

from mmfm_jax.train.clock import Clock
from mmfm_jax.train.flops import peak_flops


class Meter:
    """Speed between two readings, without what compiling, validating and saving took."""

    def __init__(self, batch_size: int, flops: float, mesh: Mesh):
        self._batch_size, self._flops = batch_size, flops
        peak = peak_flops(mesh.devices.flat[0])
        self._peak = peak and peak * mesh.size

    def start(self, ended: int, clock: Clock) -> None:
        """From here on it counts; `ended` is the newest step that has ended."""
        self._ended, self._time, self._seconds = ended, time.perf_counter(), dict(clock.seconds)

    def read(self, ended: int, clock: Clock) -> dict[str, float]:
        """Since the last reading, or nothing where no step has ended since.

        `ended` is the newest step that has ended, not the one whose metrics are read: metrics of several steps are read
        at once before a validation, and then a step would seem to take no time.
        """
        steps = ended - self._ended
        if steps <= 0:
            return {}
        spent = {name: clock.seconds[name] - self._seconds[name] for name in clock.seconds}
        busy = time.perf_counter() - self._time - spent["compile"] - spent["validate"] - spent["save"]
        self.start(ended, clock)
        rate = steps / busy
        speed = {
            "samples_per_second": rate * self._batch_size,
            "data_wait": spent["data"] / busy,
            "model_tflops_per_second": rate * self._flops / 1e12,
        }
        return speed | ({"mfu": rate * self._flops / self._peak} if self._peak else {})
