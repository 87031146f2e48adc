"""What is wrong with a configuration, told in one sentence: the field, what it is and what it must be.

No text of a file is told, for the file may be the wrong one: names of fields, numbers, and what the checks of ours say.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mmfm_jax.config.fields import KIND, at, described, holds, inside, model_for
from mmfm_jax.config.files import is_name
from mmfm_jax.config.words import alternatives, bare, choices_of, models_of, shown, words_of

Path = tuple[str | int, ...]


def describe(
    error: ValidationError,
    source: str,
    raw: Any,
    model: type[BaseModel],
    help: str = "mmfm train --help",
    flags: Mapping[Path, str] | None = None,
) -> str:
    """One sentence for the first thing wrong, unknown fields before all else, and how many more there are.

    `raw` is what was validated; `help` lists the fields. `flags`: fields that the command line set, each with a hint
    that may be empty.
    """
    found: dict[Path, tuple[bool, str]] = {}
    for one in error.errors(include_url=False, include_input=False):
        path = _path(one["loc"], raw, one["type"])
        unknown = one["type"] == "extra_forbidden"
        path = path if unknown else _whole(model, raw, path)
        if path not in found or unknown:
            found[path] = unknown, _sentence(one, path, raw, model, help)
    above = {path[:length] for path in found for length in range(len(path))}  # another alternative of what lies below
    misspelt = {(*path[:-1], _near(path, raw, model)) for path, (unknown, _) in found.items() if unknown}
    told = {path: what for path, what in found.items() if what[0] or path not in above | misspelt}
    path, (_, message) = min(told.items(), key=lambda item: not item[1][0])
    where, hint = _named(path, source, flags or {})
    more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
    return f"{where}{message}{hint}{more}"


def dotted(path: Path) -> str:
    """A path as it is written on the command line; a key that might be a text is NAME."""
    return ".".join(str(part) if isinstance(part, int) or is_name(part) else "NAME" for part in path)


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that was probably meant."""
    plain = {_plain(one): one for one in known}
    found = difflib.get_close_matches(_plain(name), plain, 1, 0.7)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _named(path: Path, source: str, flags: Mapping[Path, str]) -> tuple[str, str]:
    """Where a mistake is, on the command line or in a file, and the hint of the field of the command line."""
    for flag, hint in flags.items():
        if path[: len(flag)] == flag:
            return f"--{dotted(path)}: ", hint
    changed = next((f" with --{dotted(flag)}" for flag in flags if flag[: len(path)] == path), "")
    return f"{source}{changed}: {f'{dotted(path)}: ' if path else ''}", ""


def _path(loc: Sequence[str | int], raw: Any, kind: str) -> Path:
    """Where something is in `raw`; pydantic's address also holds which alternative of a type it tried."""
    path: list[str | int] = []
    for place, key in enumerate(loc):
        if holds(raw, key):
            raw = raw[key]
            path.append(key)
        elif kind == "missing" and place == len(loc) - 1 and isinstance(raw, dict):
            path.append(key)
    return (*path, KIND) if kind.startswith("union_tag") and isinstance(raw, dict) else tuple(path)


def _whole(annotation: Any, raw: Any, path: Path) -> Path:
    """The path as far as what is one value to a person: three sizes are, and what may be a number or several."""
    for place, key in enumerate(path):
        inner = [bare(alternative)[0] for alternative in alternatives(annotation)]
        if any(get_origin(one) is tuple and Ellipsis not in get_args(one) for one in inner):
            return path[:place]
        annotation = inside(annotation, key, raw)
        raw = _held(raw, (key,))
    return path


def _sentence(error: Any, path: Path, raw: Any, model: type[BaseModel], help: str) -> str:
    kind, value = error["type"], _held(raw, path)
    if kind == "extra_forbidden":
        return _unknown(path, raw, model, help)
    if kind in ("value_error", "assertion_error"):
        return " ".join(error["msg"].removeprefix("Value error, ").split())
    if kind.startswith("union_tag") and path[-1] == KIND:
        choices = [word for one in models_of(at(model, raw, path[:-1])) for word in choices_of(inside(one, KIND, {}))]
        return _choice(value, choices) if KIND in _held(raw, path[:-1]) else f"is missing; give one of {_or(choices)}"
    wanted = at(model, raw, path)
    if wanted is None:
        return f"is {shown(value)}, which does not fit"
    if kind == "missing" and not holds(_held(raw, path[:-1]), path[-1]):
        return f"is missing; give {words_of(wanted)}"
    if isinstance(value, str) and nearest(value, choices_of(wanted)):
        return _choice(value, choices_of(wanted))
    limit = (error.get("ctx") or {}).get("le")
    if kind == "less_than_equal" and isinstance(limit, int) and limit >= 2**31 - 1:
        return f"is too large; give {words_of(wanted)}, {limit} at most"
    in_quotes = isinstance(value, str) and _is_number(value) and "number" in words_of(wanted)
    return f"is {shown(value)}; give {words_of(wanted)}{', without quotes' if in_quotes else ''}"


def _choice(value: Any, choices: list[str]) -> str:
    near = nearest(value, choices) if isinstance(value, str) else None
    return f"is none of {_or(choices)}" + (f"; did you mean {near}?" if near else "")


def _or(choices: list[str]) -> str:
    return ", ".join(choices)


def _unknown(path: Path, raw: Any, model: type[BaseModel], help: str) -> str:
    near = _near(path, raw, model)
    if near:
        return f"is not a known field; did you mean {near}?"
    paths = [field.path for field in described(model) if path[-1] in field.path]
    elsewhere = sorted({".".join(of[: of.index(str(path[-1])) + 1]) for of in paths})
    if 0 < len(elsewhere) < 4:
        return f"is not a known field here; move it to {' or '.join(elsewhere)}"
    known = _known(path, raw, model)
    return f"is not a known field; {f'known are {_or(known)}' if 0 < len(known) < 16 else f'`{help}` lists all'}"


def _near(path: Path, raw: Any, model: type[BaseModel]) -> str | None:
    return nearest(str(path[-1]), _known(path, raw, model))


def _known(path: Path, raw: Any, model: type[BaseModel]) -> list[str]:
    above = model_for(at(model, raw, path[:-1]), _held(raw, path[:-1]))
    return list(above.model_fields) if above else []


def _held(raw: Any, path: Path) -> Any:
    for key in path:
        raw = raw[key] if holds(raw, key) else None
    return raw


def _is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False
