"""Proxy tasks, one file each: a file that defines a `Task` with a `Config` of its own kind is one; no list to edit."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from mmfm_jax.tasks.base import Task


@functools.cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def task_types() -> dict[str, type[Task]]:
    """Every task by the `kind` that names it in a configuration, in alphabetical order whatever was imported first."""
    _import_all()
    return dict(sorted(Task.kinds.items()))
