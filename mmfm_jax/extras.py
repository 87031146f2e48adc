"""Packages that only some verbs need, in the extras of `pyproject.toml`: what to say when one is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from mmfm_jax.errors import UserError


def pip_install(*extras: str) -> str:
    """The command that installs extras, as the end of a sentence."""
    names = ",".join(extras)
    return f"run `pip install 'mmfm_jax[{names}]'`, or in a checkout `pip install '.[{names}]'`"


def check_installed(what: str, packages: Sequence[str], *extras: str) -> None:
    """Raises UserError when a package that `what` needs is not installed."""
    if missing := [package for package in packages if find_spec(package) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{what} needs {' and '.join(missing)}, which {verb} not installed; {pip_install(*extras)}")
