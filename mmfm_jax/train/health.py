"""What a person should hear of how a run learns: losses of nothing, and validation that rises while training falls."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mmfm_jax.train.lines import is_loss_of_task

STILL = 100  # steps in a row without a loss, after which a part is named
RISES = 3  # validations in a row
NOISE = 0.05  # of the lowest validation loss: what is above it by less may be chance


class Health:
    """Tells each thing once, as one sentence."""

    def __init__(self, parts: Iterable[str], tell: Callable[[str], None]):
        """`parts`: of the tasks' losses, as `TASK/PART`."""
        self._tell = tell
        self._still = dict.fromkeys(parts, 0)
        self._steps = 0
        self._tasks: dict[str, _Task] = {}

    def trained(self, metrics: dict[str, float]) -> None:
        """After each step. A part of which a batch held nothing has a loss of exactly 0."""
        self._steps += 1
        for name in self._still:
            self._still[name] = self._still[name] + 1 if metrics.get(name) == 0 else 0
        self._tell_still(STILL)
        for name, value in metrics.items():
            if is_loss_of_task(name):
                self._tasks.setdefault(name.removesuffix("/loss"), _Task()).trained(value)

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        for name, task in self._tasks.items():
            value = metrics.get(f"validation/{name}/loss")
            if value is not None and (sentence := task.validated(name, step, value)):
                self._tell(sentence)

    def finish(self) -> None:
        """At the end, of a run that was too short to tell before."""
        self._tell_still(max(1, self._steps))

    def _tell_still(self, steps: int) -> None:
        for name in [name for name, still in self._still.items() if still >= steps]:
            del self._still[name]
            task, _, part = name.partition("/")
            of = "its loss" if part == "loss" else f"its loss of {part}"
            self._tell(
                f"tasks.{task}: {of} was 0 in each of {steps} steps, so that nothing is learnt by it: no study drawn "
                "so far held all that it needs; see what studies hold (`mmfm inspect STORE`), or leave it out"
            )


class _Task:
    """Losses of one task."""

    def __init__(self):
        self._sum, self._count = 0.0, 0  # of training since the last validation
        self._lowest, self._at, self._beside = float("inf"), 0, float("inf")
        self._above, self._told = 0, False

    def trained(self, loss: float) -> None:
        self._sum, self._count = self._sum + loss, self._count + 1

    def validated(self, name: str, step: int, loss: float) -> str | None:
        """The sentence, when there is cause for it the first time."""
        training = self._sum / self._count if self._count else float("inf")
        self._sum, self._count = 0.0, 0
        if loss <= self._lowest:
            self._lowest, self._at, self._beside = loss, step, training
        risen = loss > self._lowest + NOISE * abs(self._lowest)
        self._above = self._above + 1 if risen else 0
        if self._told or self._above < RISES or training >= self._beside:
            return None
        self._told = True
        return (
            f"tasks.{name}: its validation loss, {loss:.3f} at step {step}, was above the {self._lowest:.3f} of step "
            f"{self._at} {RISES} times in a row while that of training fell from {self._beside:.3f} to {training:.3f}: "
            "it learns its training studies by heart; train.patience ends such a run, and the best checkpoint is kept"
        )
