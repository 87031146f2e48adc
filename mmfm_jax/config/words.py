"""Types of fields, and values that do not fit them, in the words of help and errors."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmfm_jax.config.base import LARGEST, Order

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_KINDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", "true or false each"),
}


def type_of(field: FieldInfo) -> Any:
    """A field's annotation with the bounds that pydantic keeps beside it."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def bare(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation without its bounds, and those."""
    if get_origin(annotation) is not Annotated:
        return annotation, ()
    inner, *metadata = get_args(annotation)
    flat = [one for item in metadata for one in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return inner, tuple(flat)


def alternatives(annotation: Any) -> Iterator[Any]:
    """What a value may be: the members of a union, or the annotation itself."""
    inner, _ = bare(annotation)
    if get_origin(inner) in (Union, types.UnionType):
        for member in get_args(inner):
            yield from alternatives(member)
    else:
        yield annotation


def words_of(annotation: Any) -> str:
    """What a value must be: `a whole number above 0`."""
    return _joined(annotation, plural=False)


def choices_of(annotation: Any) -> list[str]:
    """The words of which a value may be one."""
    literals = (bare(alternative)[0] for alternative in alternatives(annotation))
    return [str(word) for literal in literals if get_origin(literal) is Literal for word in get_args(literal)]


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The mappings of known fields that a value may be."""
    inner = (bare(alternative)[0] for alternative in alternatives(annotation))
    return [model for model in inner if isinstance(model, type) and issubclass(model, BaseModel)]


def shown(value: Any) -> str:
    """What a value is, without a text that might be a patient's."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return "infinite" if math.isinf(value) else "not a number"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number too large"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return "a text" if value else "an empty text"
    return f"a list of {len(value)}" if isinstance(value, list) else "a mapping"


def _one(annotation: Any, plural: bool = False) -> str:
    inner, metadata = bare(annotation)
    origin, args = get_origin(inner), get_args(inner)
    if inner in _KINDS:
        return _KINDS[inner][plural] + _bounds(metadata)
    if inner is types.NoneType:
        return "null"
    if origin is Literal:
        return f"{'words among' if plural else 'one of'} {', '.join(map(str, args))}"
    if origin is tuple:
        return _list(args, metadata, plural)
    if origin is dict:
        return f"{'mappings' if plural else 'a mapping'} of names to {_joined(args[1], plural=True)}"
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        return f"{'mappings' if plural else 'a mapping'} with {_some(inner)}"
    return "values" if plural else "a value"


def _joined(annotation: Any, plural: bool) -> str:
    found = list(alternatives(annotation))
    if len(models_of(annotation)) > 1:
        return "mappings with kind and its fields" if plural else "a mapping with kind and its fields"
    several = [get_args(bare(one)[0]) for one in found]
    such = [args[-1:] == (Ellipsis,) and args[0] in found for args in several]
    words = ["a list of such" if is_such else _one(one, plural) for one, is_such in zip(found, such)]
    return " or ".join(dict.fromkeys(words))


def _list(args: tuple[Any, ...], metadata: Iterable[Any], plural: bool) -> str:
    if args[-1] is Ellipsis:
        return f"{'lists' if plural else 'a list'} of {_joined(args[0], plural=True)}"
    order = "".join(f" ({item.entries})" for item in metadata if isinstance(item, Order))
    return f"{'lists of ' if plural else ''}{_NUMBERS[len(args)]} {_joined(args[0], plural=True)}{order}"


def _some(model: type[BaseModel]) -> str:
    names = list(model.model_fields)
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _bounds(metadata: Iterable[Any]) -> str:
    found = {
        name: value
        for item in metadata
        for name in ("gt", "ge", "lt", "le")
        if (value := getattr(item, name, None)) is not None and value not in (LARGEST, 2**32 - 1, 2**63 - 1)
    }
    low = f" above {found['gt']}" if "gt" in found else f" of {found['ge']} or more" if "ge" in found else ""
    if "ge" in found and "le" in found:
        return f" from {found['ge']} to {found['le']}"
    high = f" below {found['lt']}" if "lt" in found else f" up to {found['le']}" if "le" in found else ""
    return f"{low} and{high}" if low and high else low or high
