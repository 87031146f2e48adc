"""Complete experiments and descriptions of data sets to start from: the files of `configs/`, which a wheel brings."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import mmfm_jax
from mmfm_jax.errors import UserError

_PACKAGE = Path(mmfm_jax.__file__).parent
PLACES = (_PACKAGE / "examples", _PACKAGE.parent / "configs")
"""Where they lie in an installed wheel, and in a checkout."""
EXPERIMENT, DATASET = "experiment", "data set"


@dataclass(frozen=True)
class Example:
    path: Path
    kind: str
    """EXPERIMENT or DATASET."""

    @property
    def text(self) -> str:
        """The file without the line that names the schema beside it."""
        return re.sub(r"# yaml-language-server: .*\n", "", self.path.read_text())

    @property
    def about(self) -> str:
        """The first sentence of its header."""
        return re.split(r"[.:](?= |$)", _header(self.text), maxsplit=1)[0]

    def at(self, out: Path) -> str:
        """The text as it is written to `out`: its commands name that file, and what it reads lies beside it."""

        def beside(named: re.Match[str]) -> str:
            return shlex.quote(str(out if named[1] == self.path.name else out.with_name(named[1])))

        text = re.sub(r"configs/(?:\w+/)?([\w.]+)", beside, self.text)
        return re.sub(r"(?m)^root: \.\./\.\./", "root: ", text)


def examples() -> dict[str, Example]:
    """All of them by name, experiments first. Raises UserError when the installation lacks them."""
    place = next((place for place in PLACES if (place / "demo.yaml").exists()), None)
    if place is None:
        raise UserError(f"{PLACES[0]}: the examples are missing; install mmfm_jax again")
    kinds = {"*.yaml": EXPERIMENT, "pod/*.yaml": EXPERIMENT, "data/*.yaml": DATASET}
    return {path.stem: Example(path, kind) for glob, kind in kinds.items() for path in sorted(place.glob(glob))}


def listing() -> str:
    """A line for each example: its name and what it is."""
    found = examples()
    width = max(map(len, found))
    lines = []
    for kind in (EXPERIMENT, DATASET):
        of_kind = [f"  {name:{width}}  {one.about}" for name, one in found.items() if one.kind == kind]
        lines += [f"{kind}s:", *of_kind]
    return "\n".join(lines)


def write_example(name: str, out: Path | None = None) -> str:
    """Writes an example to `out` (NAME.yaml in the working directory); returns what to say, the next commands with it.

    Raises UserError when there is no such example, or `out` exists or cannot be written.
    """
    found = examples()
    if name not in found:
        raise UserError(f"init: there is no example {name}; there are {', '.join(found)}")
    out = out or Path(f"{name}.yaml")
    text = found[name].at(out)
    if os.path.lexists(out):
        raise UserError(f"{out}: is there already; name another file with --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("x") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}; name another with --out") from error
    return "\n".join([f"{out} is written. Adapt it, then:", "", *(f"    {command}" for command in _commands(text))])


def _commands(text: str) -> list[str]:
    """The lines of a header that a shell takes."""
    return [line for line in _header(text, "\n").split("\n") if re.match(r"(mmfm|export|openssl) ", line)]


def _header(text: str, between: str = " ") -> str:
    """The comment that a file begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return between.join(lines)
