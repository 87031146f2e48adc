"""Every field of a configuration as a page of Markdown, made of its JSON schema: behind `mmfm schema --markdown`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]
LIMITS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
OWN = "fields of its own"
LARGEST = 2**31 - 1  # a limit of what a machine can count is none that a reader asks for


def markdown(title: str, command: str, schema: Schema) -> str:
    """The page. `command`: what prints it. Parts come in the order in which a reader meets them, each once, under the
    first of the places where it may stand; NAME is a name of the user's."""
    parts = _parts(schema)
    lines = [f"# {title}", "", f"Printed by `{command}`; the text is that of the fields in the code.", ""]
    for places, part in parts:
        shown = ", ".join(f"`{place}`" for place in places)
        if places[0]:
            lines += [f"## `{places[0]}`", ""]
        lines += [_flat(part["description"]), ""]
        if len(places) > 1:
            lines += [f"Stands at {shown}.", ""]
        lines += [_field(name, of, part) for name, of in part["properties"].items()]
        lines += [""]
    return "\n".join(lines).rstrip("\n")


def _parts(schema: Schema) -> list[tuple[list[str], Schema]]:
    """Every object of the schema with the places where it stands, the whole first."""
    places: dict[str, list[str]] = {"": [""]}
    waiting = [("", schema)]
    found = {"": schema}
    while waiting:
        place, part = waiting.pop(0)
        for field, of in part["properties"].items():
            for suffix, name in _referred(of):
                here = f"{place}.{field}".lstrip(".") + suffix
                kind = schema["$defs"][name]["properties"].get("kind", {}).get("const")
                here += f" (kind: {kind})" if kind else ""
                places.setdefault(name, []).append(here)
                if name not in found:
                    found[name] = schema["$defs"][name]
                    waiting.append((here.partition(" (")[0], found[name]))
    return [(places[name], part) for name, part in found.items()]


def _referred(of: Schema, suffix: str = "") -> Iterator[tuple[str, str]]:
    """Objects that a field may hold, and what comes after the field's name on the way to them."""
    if "$ref" in of:
        yield suffix, of["$ref"].rpartition("/")[2]
    for one in [*of.get("anyOf", ()), *of.get("oneOf", ()), *of.get("prefixItems", ())]:
        yield from _referred(one, suffix)
    if "items" in of:
        yield from _referred(of["items"], suffix + "[]")
    for one in _named(of):
        yield from _referred(one, suffix + ".NAME")


def _named(of: Schema) -> list[Schema]:
    """What stands under names of the user's."""
    free = of.get("additionalProperties")
    return [*of.get("patternProperties", {}).values(), *([free] if isinstance(free, dict) else [])]


def _field(name: str, of: Schema, part: Schema) -> str:
    told = [_type(of)]
    if name in part.get("required", ()):
        told.append("required")
    elif "default" in of and (OWN not in told[0] or of["default"] is None):
        told.append(f"default `{json.dumps(of['default'], ensure_ascii=False)}`")
    return f"- **{name}** ({', '.join(told)}): {_flat(of['description'])}"


def _type(of: Schema) -> str:
    """What a field may hold, in words."""
    if "const" in of:
        return f"`{of['const']}`"
    if "enum" in of:
        return " or ".join(f"`{value}`" if value else '`""`' for value in of["enum"])
    if "$ref" in of or "oneOf" in of:
        return OWN
    if "anyOf" in of:
        return " or ".join(dict.fromkeys(map(_type, of["anyOf"])))
    if "prefixItems" in of:
        return f"[{', '.join(map(_type, of['prefixItems']))}]"
    if "items" in of:
        each = _type(of["items"])
        return (
            ("list, each with " if each == OWN else "list of ") + each + (", one or more" if "minItems" in of else "")
        )
    if named := _named(of):
        each = _type(named[0])
        return ("by name, each with " if each == OWN else "by name, each ") + each
    limits = [f"{word} {of[key]}" for key, word in LIMITS.items() if key in of and of[key] < LARGEST]
    return " ".join([of.get("type", "anything"), *limits])


def _flat(text: str) -> str:
    """On one line."""
    return " ".join(text.split())
