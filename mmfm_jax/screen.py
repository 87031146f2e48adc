"""Consoles and bars, on which text of others is shown as the characters that it is, never obeyed.

Names, units and descriptions of a store may hold what a terminal or a library takes for a command: control characters,
marks that turn the order of letters around, `[bold]` of rich.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TextColumn
    from rich.text import Text

Item = TypeVar("Item")


def printable(text: str, keep: str = "") -> str:
    r"""`text` with white space as plain blanks, and what else cannot be seen written out, such as \x1b and \u202e.

    `keep`: characters that stay as they are, such as a new line.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def plain(text: str, style: str = "") -> Text:
    """Text for rich in which nothing is a command; lines stay lines."""
    from rich.text import Text

    return Text(printable(text, "\n"), style=style)


def make_console(**more) -> Console:
    """A console that takes strings as text: without markup and emoji, and with nothing in them that cannot be seen."""
    from rich.console import Console

    class Screen(Console):
        def render_str(self, text: str, **options) -> Text:
            return super().render_str(printable(text, "\n"), **options)

    return Screen(markup=False, emoji=False, **more)


def text_column(text: str) -> TextColumn:
    """A column of a progress bar, its text printed as it is."""
    from rich.progress import TextColumn

    return TextColumn(text, markup=False)


def progress_on(console: Console) -> Progress:
    """A bar with counts and the time that is left; gone at its end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

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
