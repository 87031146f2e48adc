"""Fields set on the command line: `--train.steps 500`, `--train.steps=500`, `--inputs.images.ct.size 32 64 64`.

A dotted name leads through mappings by key and lists by number; `-` may stand for `_` in names of fields. A value is
YAML, except where the field is a text and takes it as it stands; several words are a list.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from mmfm_jax.config.fields import at, inside, model_for
from mmfm_jax.config.files import parse
from mmfm_jax.config.mistakes import Path, nearest
from mmfm_jax.config.words import alternatives, bare, type_of
from mmfm_jax.errors import UserError

NULLS = ("null", "~", "None")


def apply_flags(
    raw: dict[str, Any], words: Sequence[str], model: type[BaseModel]
) -> tuple[dict[str, Any], dict[Path, str]]:
    """`raw` with the fields of `words` set, later ones last; and what was set or made for that, each with a hint for
    errors, or none.

    Raises UserError for words that set nothing.
    """
    changed, flags = copy.deepcopy(raw), {}
    for name, values in _split(words):
        flags |= _set(changed, name, values, model)
    return changed, flags


def _split(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if not all(name.split(".")):
                raise UserError(f"{word}: is no field; write it as --train.steps 500")
            found.append((name, [value] if equals else []))
        elif not found:
            raise UserError(f"{word}: is no option; a field is set as --train.steps 500")
        else:
            found[-1][1].append(word)
    for name, values in found:
        if not values:
            raise UserError(f"--{name}: has no value; write it as --{name} VALUE")
    return found


def _set(raw: dict[str, Any], name: str, values: list[str], model: type[BaseModel]) -> dict[Path, str]:
    """Sets one field; returns where, and the first mapping or list that was made on the way, with what was meant."""
    node, annotation, made = raw, model, {}
    path: list[str | int] = []
    *above, last = name.split(".")
    for part in above:
        key = _key(node, annotation, part, name)
        path.append(key)
        child = _held(node, key)
        if not isinstance(child, dict | list):
            made = made or {tuple(path): _meant(node, annotation, path)}
            child = _default(annotation, key, node)
            _put(node, key, child)
        annotation = None if annotation is None else inside(annotation, key, node)
        node = child
    path.append(_key(node, annotation, last, name))
    _put(node, path[-1], _value(values, at(model, raw, path), f"--{name}"))
    return {tuple(path): "", **made}


def _meant(node: Any, annotation: Any, path: list[str | int]) -> str:
    """A hint where an entry of the user's naming is made beside others."""
    if isinstance(node, list) or _is_field(annotation, path[-1], node):
        return ""
    near = nearest(str(path[-1]), list(node))
    return f"; was --{'.'.join(map(str, [*path[:-1], near]))} meant?" if near else ""


def _held(node: Any, key: Any) -> Any:
    if isinstance(node, list):
        return node[key] if key < len(node) else None
    return node.get(key)


def _put(node: Any, key: Any, value: Any) -> None:
    if isinstance(node, list) and key == len(node):
        node.append(value)
    else:
        node[key] = value


def _key(node: Any, annotation: Any, part: str, name: str) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or int(part) > len(node):
            entries = f"0 to {len(node) - 1}, or {len(node)} for one more" if node else "0 for the first"
            raise UserError(f"--{name}: {part} is no place in a list of {len(node)}; give {entries}")
        return int(part)
    plain = part.replace("-", "_")
    return plain if part not in node and _is_field(annotation, plain, node) else part


def _is_field(annotation: Any, key: Any, node: Any) -> bool:
    found = model_for(annotation, node) if annotation is not None else None
    return found is not None and key in found.model_fields


def _default(annotation: Any, key: Any, node: Any) -> Any:
    """What a list or mapping holds that the file does not name."""
    found = model_for(annotation, node) if annotation is not None else None
    if found is None or key not in found.model_fields:
        return {}
    field = found.model_fields[key]
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json")
    lists = any(getattr(bare(one)[0], "__origin__", None) is tuple for one in alternatives(type_of(field)))
    return list(default) if isinstance(default, tuple) else [] if lists and default is None else {}


def _value(values: list[str], annotation: Any, source: str) -> Any:
    if len(values) > 1:
        kinds = [None if annotation is None else inside(annotation, place, []) for place in range(len(values))]
        return [_word(value, kind, source) for value, kind in zip(values, kinds)]
    return _word(values[0], annotation, source)


def _word(text: str, annotation: Any, source: str) -> Any:
    kinds = [] if annotation is None else [bare(one)[0] for one in alternatives(annotation)]
    if text in NULLS and type(None) in kinds:
        return None
    return text if str in kinds else parse(text, source)
