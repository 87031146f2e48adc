"""The fields of a configuration by their dotted names: what lies where, and a list of all for help."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmfm_jax.config.words import alternatives, bare, models_of, type_of, words_of

KIND = "kind"
"""The field that tells which of several mappings one is."""


def holds(raw: Any, key: str | int) -> bool:
    """Whether a mapping has the key, or a list the place."""
    return key in raw if isinstance(raw, dict) else isinstance(raw, list) and isinstance(key, int) and key < len(raw)


def model_for(annotation: Any, value: Any) -> type[BaseModel] | None:
    """Which mapping of known fields a value is to be; None where it is none, or its `kind` is not known."""
    models = models_of(annotation)
    if len(models) < 2:
        return models[0] if models else None
    kind = value.get(KIND) if isinstance(value, dict) else None
    return next((model for model in models if kind in _kinds(model)), None)


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields[KIND].annotation) if KIND in model.model_fields else ()


def inside(annotation: Any, key: str | int, value: Any) -> Any:
    """The type of what lies under `key` in `value`, which is of the type `annotation`; None where nothing may."""
    model = model_for(annotation, value)
    if model and key in model.model_fields:
        return type_of(model.model_fields[str(key)])
    for alternative in alternatives(annotation):
        inner, _ = bare(alternative)
        origin, args = get_origin(inner), get_args(inner)
        if origin is dict and isinstance(key, str):
            return args[1]
        if origin is tuple and isinstance(key, int):
            return args[0] if args[-1] is Ellipsis else args[key] if key < len(args) else None
    return None


def at(annotation: Any, raw: Any, path: Sequence[str | int]) -> Any:
    """The type of what lies at `path`; None where nothing may."""
    for key in path:
        annotation = inside(annotation, key, raw)
        if annotation is None:
            return None
        raw = raw[key] if holds(raw, key) else None
    return annotation


@dataclass(frozen=True)
class Described:
    """A field for help: NAME stands for a name of the user's, N for a place in a list."""

    path: tuple[str, ...]
    words: str
    default: str
    """In YAML; empty for a field that must be given."""
    text: str
    kind: str = ""
    """Of the task, for fields that only some tasks have."""


@functools.cache
def described(model: type[BaseModel]) -> tuple[Described, ...]:
    """Every field, down to those that are no mapping."""
    return tuple(_described(model, (), ""))


def _described(model: type[BaseModel], above: tuple[str, ...], kind: str) -> Iterator[Described]:
    for name, field in model.model_fields.items():
        path, within = (*above, name), list(_within(type_of(field)))
        section = field.annotation in models_of(type_of(field)) or any(key for key, _ in within)
        if not section:
            text = " ".join((field.description or "").split())
            yield Described(path, words_of(type_of(field)), _default(field), text, kind)
        for key, inner in within:
            yield from _described(inner, (*path, *key), _kinds(inner)[0] if len(within) > 1 and _kinds(inner) else kind)


def _within(annotation: Any) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    for alternative in alternatives(annotation):
        inner, _ = bare(alternative)
        origin, args = get_origin(inner), get_args(inner)
        if origin is dict or (origin is tuple and args[-1] is Ellipsis):
            for key, model in _within(args[1] if origin is dict else args[0]):
                yield ("NAME" if origin is dict else "N", *key), model
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            yield (), inner


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    return as_yaml(field.get_default(call_default_factory=True))


def as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return str(value) if value != "" else '""'


def listing(model: type[BaseModel], width: int = 110) -> str:
    """Every field with its type, default and text, by section."""
    import textwrap

    lines, section = [], None
    for field in described(model):
        at = field.path[0] + (f".NAME, kind: {field.kind}" if field.kind else "")
        if at != section:
            lines += ["", f"{at}:" if len(field.path) > 1 else ""]
            section = at
        default = f"default {field.default}" if field.default else "required"
        lines.append(f"  --{'.'.join(field.path)}  {field.words}; {default}")
        lines += textwrap.wrap(field.text, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(line for i, line in enumerate(lines) if line or (i and lines[i - 1]))
