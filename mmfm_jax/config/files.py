"""YAML read and what is wrong with it told in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mmfm_jax.errors import UserError


def read_yaml(path: str | Path, wanted: str) -> Any:
    """What a YAML file holds. `wanted` says what to give instead. Raises UserError when it cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; give the path of {wanted}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; give the path of {wanted}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def describe(error: ValidationError, source: str, help: str = "mmfm train CONFIG --help") -> str:
    """One sentence for the first thing wrong, and how many more there are; `help` lists all keys."""
    first, *rest = error.errors()
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"is not a known key; check its spelling against `{help}`"
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{source}: {field + ': ' if field else ''}{message}{more}"
