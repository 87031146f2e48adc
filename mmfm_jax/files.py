"""How files of ours are written: whole or not at all, and never into what someone else laid at their place.

A folder may come from a stranger with links in it. So a file is written beside its place under a random name that is
opened only if nothing has it, and then takes its place; a link that was there gives way and is not followed. What is
appended to or locked is opened without following links, and only if no other name leads to it.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mmfm_jax.errors import UserError

PARTIAL = ".partial"
_NEVER_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@contextmanager
def written(path: Path, private: bool = False) -> Iterator[BinaryIO]:
    """A file that takes its place when it is whole. `private`: only its owner may read it, whatever the umask.

    Raises OSError when it cannot be written, or a folder, pipe or device has its name.
    """
    with suppress(FileNotFoundError):
        kind = os.lstat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
            raise OSError("it is a folder, a pipe or a device")
    partial = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}{PARTIAL}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NEVER_FOLLOW
    descriptor = os.open(partial, flags, 0o600 if private else 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def replace(path: Path, content: str | bytes, private: bool = False, mend: str = "") -> None:
    """Writes a file whole or not at all, as `written` does. `mend`: what to do where that cannot be.

    Raises UserError when it cannot be written.
    """
    try:
        with written(path, private) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        more = f"; {mend}" if mend else ""
        raise UserError(f"{path}: cannot be written: {error.strerror or error}{more}") from error


def open_own(path: Path, flags: int) -> int:
    """The descriptor of a file that is made if it is not there; `flags` as of os.open.

    Raises OSError for a link, for a file that has another name too, and for what is no file.
    """
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NONBLOCK | _NEVER_FOLLOW, 0o666)
    held = os.fstat(descriptor)
    if stat.S_ISREG(held.st_mode) and held.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    raise OSError("it is not a file of its own: it has another name too, or is a pipe or a device")


def refuse_links(folder: Path) -> None:
    """Raises UserError when a folder that is about to be written into holds a link."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_symlink():
            raise UserError(
                f"{entry}: is a link, and a run is written into its own folder alone; put there what the link leads "
                "to, or give another --run"
            )
