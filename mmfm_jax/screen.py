"""Consoles that print text as it is: brackets of a path, a unit or an extra are no markup, and :100: is no picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


def screen(**options: Any) -> Console:
    """A console with these options of `rich.console.Console`."""
    return Console(markup=False, emoji=False, **options)


def text_column(text: str) -> TextColumn:
    """A column of a progress bar, its text printed as it is."""
    return TextColumn(text, markup=False)


def progress_on(console: Console) -> Progress:
    """A bar with counts and the time that is left; gone at its end."""
    return Progress(
        text_column("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        text_column("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def counted(items: Iterable[Item], words: str, console: Console, total: int | None = None) -> Iterable[Item]:
    """The items, counted on the console as they are taken; `total` of what has no length."""
    with progress_on(console) as progress:
        of = len(items) if total is None and isinstance(items, Sequence) else total
        yield from progress.track(items, total=of, description=words)
