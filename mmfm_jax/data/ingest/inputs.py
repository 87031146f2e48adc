"""Which files are inputs: found below the root by pattern, never by following what leads out of it."""

from __future__ import annotations

import bisect
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmfm_jax.data.ingest.dataset import Dataset
from mmfm_jax.data.refuse import Refused
from mmfm_jax.errors import UserError


@dataclass(frozen=True)
class Input:
    """A file below the root."""

    path: str
    """Below the root, with / between folders."""
    size: int
    changed_ns: int
    refused: Refused | None = None
    """Why it must not even be opened."""

    @property
    def state(self) -> str:
        return f"{self.path}\0{self.size}\0{self.changed_ns}"


def root_of(dataset: Dataset, described_in: Path) -> Path:
    """The folder that all inputs are below. Raises UserError when it is none."""
    root = described_in.parent / Path(dataset.root).expanduser()
    if not root.is_dir():
        raise UserError(f"{described_in}: root: {dataset.root} is not a folder; mend the path")
    return root.resolve()


class Files:
    """Every file below the root by its path, in the order of paths within each folder."""

    def __init__(self, root: Path):
        self.root = root
        self.by_path = {one.path: one for one in find(root)}
        self._sorted = sorted(self.by_path)

    def at(self, path: str) -> list[Input]:
        """The file at a path, or the files below it when it is a folder; what is not there is an Input that says so."""
        folder = path.rstrip("/") + "/"
        first = bisect.bisect_left(self._sorted, folder)
        last = bisect.bisect_left(self._sorted, folder[:-1] + "0")  # the character after /
        below = [self.by_path[one] for one in self._sorted[first:last]]
        return below or [self.by_path.get(path) or look_at(self.root, path)]


def find(root: Path) -> Iterator[Input]:
    """Every file below the root, in the order of their paths; hidden ones (whose name starts with a dot) left out.

    Links are followed to files below the root only; a folder is never entered through a link.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                held = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError:
            yield Input(folder.rstrip("/"), 0, 0, Refused("unreadable", "the folder cannot be listed"))
            continue
        for entry in (e for e in held if not e.name.startswith(".")):
            path = folder + entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(path + "/")
            elif not (
                entry.is_symlink() and entry.is_dir() and _inside(root, path)
            ):  # such a folder is met in its place
                yield look_at(root, path)


def look_at(root: Path, path: str) -> Input:
    """A file below the root, with the reason why it must not be opened, if there is one."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        return Input(path, 0, 0, Refused("outside_root", "its path leads out of the root"))
    if not _inside(root, path):
        return Input(path, 0, 0, Refused("outside_root", "it is a link that leads out of the root"))
    try:
        found = os.stat(root / path)
    except OSError:
        return Input(path, 0, 0, Refused("missing_file", "there is no such file"))
    if not stat.S_ISREG(found.st_mode):
        return Input(path, 0, 0, Refused("not_a_file", "it is a folder, a pipe or a device"))
    if not os.access(root / path, os.R_OK):
        return Input(path, found.st_size, found.st_mtime_ns, Refused("unreadable", "it may not be read"))
    return Input(path, found.st_size, found.st_mtime_ns)


def _inside(root: Path, path: str) -> bool:
    real = os.path.realpath(root / path)
    return real == str(root) or real.startswith(f"{root}{os.sep}")


def pattern(glob: str) -> re.Pattern[str]:
    """The regular expression of a pattern such as `ct/**/*.dcm`; ** stands for any number of folders, none too."""
    out, at = "", 0
    while at < len(glob):
        if glob.startswith("**/", at):
            out, at = out + "(?:.*/)?", at + 3
        elif glob.startswith("**", at):
            out, at = out + ".*", at + 2
        elif glob[at] == "*":
            out, at = out + "[^/]*", at + 1
        elif glob[at] == "?":
            out, at = out + "[^/]", at + 1
        else:
            out, at = out + re.escape(glob[at]), at + 1
    return re.compile(out + r"\Z", re.DOTALL)
