"""Results of workers, counted on the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.progress import Progress

from mmfm_jax.data.ingest.pool import Runner


def shown(
    progress: Progress, words: str, function: Callable[[Any], Any], tasks: Sequence[Any], pool: Runner
) -> Iterator[tuple[int, Any]]:
    """What `Runner.run` yields, counted on the screen."""
    bar = progress.add_task(words, total=len(tasks))
    for result in pool.run(function, tasks):
        progress.advance(bar)
        yield result
