"""Bars with counts and the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmfm_jax.data.ingest.pool import Runner


def progress_on(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def shown(
    progress: Progress, words: str, function: Callable[[Any], Any], tasks: Sequence[Any], pool: Runner
) -> Iterator[tuple[int, Any]]:
    """What `Runner.run` yields, counted on the screen."""
    bar = progress.add_task(words, total=len(tasks))
    for result in pool.run(function, tasks):
        progress.advance(bar)
        yield result
