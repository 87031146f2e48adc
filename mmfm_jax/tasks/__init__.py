"""Proxy tasks, one file each: a file that defines a `Task` with a `Config` of its own kind is one; no list to edit.

A task that comes with the project has its `Config` in `config/tasks`, under the same name, so that a configuration is
checked without JAX; one whose `Config` lies in its own file is imported for that.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from typing import TYPE_CHECKING, get_args

from mmfm_jax.config import tasks as configs
from mmfm_jax.config.tasks.base import TaskConfig

if TYPE_CHECKING:
    from mmfm_jax.tasks.base import Task


@functools.cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def task_types() -> dict[str, type[Task]]:
    """Every task by the `kind` that names it in a configuration, in alphabetical order whatever was imported first."""
    from mmfm_jax.tasks.base import Task

    _import_all()
    return dict(sorted(Task.kinds.items()))


def task_configs() -> dict[str, type[TaskConfig]]:
    """What every task can be configured with, by its `kind`, in alphabetical order."""
    apart = [module.name for module in pkgutil.iter_modules(configs.__path__)]
    found = _configs_of(tuple(apart))
    own_file = {module.name for module in pkgutil.iter_modules(__path__)} - set(apart)
    if own_file or f"{__name__}.base" in sys.modules:  # JAX is there already, and maybe a task defined elsewhere
        found = found | {kind: task.Config for kind, task in task_types().items()}
    return dict(sorted(found.items()))


@functools.cache
def _configs_of(names: tuple[str, ...]) -> dict[str, type[TaskConfig]]:
    modules = [importlib.import_module(f"{configs.__name__}.{name}") for name in names]
    defined = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, TaskConfig) and value.__module__ == module.__name__
    ]
    return {get_args(of.model_fields["kind"].annotation)[0]: of for of in defined if of is not TaskConfig}
