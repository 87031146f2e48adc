"""YAML of a person's, read with care: what cannot be meant is refused by line and column, never by quoting the file.

Numbers are those of YAML 1.2: `1e-3` is one, `012` and `1:30` are texts, and so is a date. A key stands once in its
mapping.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mmfm_jax.errors import UserError

LARGEST_BYTES = 2**20
LARGEST_NODES = 100_000
"""Once aliases are written out."""
DEEPEST = 50
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_MENDS = {
    "found character '\\t' that cannot start any token": "indent with spaces, not with tabs",
    "mapping values are not allowed here": "a text that holds a colon stands in quotes",
    "found undefined alias": "a text that begins with * stands in quotes",
    "could not determine a constructor": "a text that begins with ! stands in quotes",
    "found unhashable key": "a key is a name",
}


class _Wrong(Exception):
    def __init__(self, mark: yaml.Mark | None, what: str):
        self.mark, self.what = mark, what


class Numbers:
    """Texts that are numbers, the same when read and when written."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in (("float", _FLOAT, "-+0123456789."), ("int", _INTEGER, "-+0123456789")):
    for _character in _first:
        resolvers = Numbers.yaml_implicit_resolvers.setdefault(_character, [])
        resolvers.append((f"tag:yaml.org,2002:{_tag}", _pattern))


class _Loader(Numbers, yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # of Python, such as a number of 5,000 digits
            raise _Wrong(node.start_mark, "a number that is too long") from error

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 16 if "x" in text else 10)

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _check_once(node)
        return self.construct_document(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(Numbers, yaml.SafeDumper):
    """Writes what `parse` reads back as it was."""


def read_yaml(path: str | Path, wanted: str) -> Any:
    """What a YAML file holds. `wanted` says what to give instead. Raises UserError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            held = file.read(LARGEST_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; give the path of {wanted}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {_reason(error)}; give the path of {wanted}") from error
    if len(held) > LARGEST_BYTES:
        raise UserError(f"{path}: holds more than {LARGEST_BYTES} bytes; give the path of {wanted}")
    try:
        text = held.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = held.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not text in UTF-8; save it as that, or give {wanted}") from error
    return parse(text, str(path))


def parse(text: str, source: str) -> Any:
    """What YAML holds; `source` is named in errors. Raises UserError with line and column, and nothing of the text."""
    try:
        return yaml.load(text, _Loader)
    except _Wrong as error:
        raise UserError(f"{source}: {_place(error.mark)}{error.what}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{source}: line {line} holds a character that no text has; it is no YAML") from error
    except yaml.MarkedYAMLError as error:
        mend = next((mend for problem, mend in _MENDS.items() if (error.problem or "").startswith(problem)), "")
        where = _place(error.problem_mark or error.context_mark)
        raise UserError(f"{source}: {where}not valid YAML{'; ' if mend else ''}{mend}") from error
    except RecursionError as error:
        raise UserError(f"{source}: is nested too deep; no brackets or indents of a configuration go so far") from error


def dump(value: Any) -> str:
    """YAML that `parse` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


def as_json(value: Any, source: str, path: str = "") -> Any:
    """What JSON can hold of a value. Raises UserError that names a key that is no text, or what JSON cannot hold."""
    where = f"{source}: {path}: " if path else f"{source}: "
    if path.count(".") > DEEPEST:
        raise UserError(f"{source}: is nested too deep; no brackets or indents of a configuration go so far")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                said = "empty" if key is None else "true, yes or the like" if isinstance(key, bool) else "a number"
                raise UserError(f"{where}a key is {said} where a name is meant; put it in quotes")
        below = {key: f"{path}.{key if is_name(key) else 'NAME'}".lstrip(".") for key in value}
        return {key: as_json(inner, source, below[key]) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner, source, f"{path}.{place}") for place, inner in enumerate(value)]
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where}holds half a character; write it as text in UTF-8")
    if value is not None and not isinstance(value, bool | int | float | str):
        raise UserError(f"{where}is of a kind that no field takes; give a number, a text, a list or a mapping")
    return value


def is_name(key: str) -> bool:
    """Whether a key may be shown: a word, which no report of a patient's is."""
    return re.fullmatch(r"[\w.+-]{1,40}", key, re.ASCII) is not None


def _check_once(root: yaml.Node) -> None:
    """Raises _Wrong when a key stands twice in a mapping, or aliases multiply beyond `LARGEST_NODES`."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise _Wrong(node.start_mark, "an alias stands inside of what it is an alias of")
            return sizes[id(node)]
        sizes[id(node)] = 0
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        parts = [part for entry in node.value for part in entry] if isinstance(node, yaml.MappingNode) else node.value
        total = 1 + (sum(map(size, parts)) if isinstance(node, yaml.CollectionNode) else 0)
        if total > LARGEST_NODES:
            raise _Wrong(node.start_mark, f"holds more than {LARGEST_NODES} entries once aliases are written out")
        sizes[id(node)] = total
        return total

    size(root)


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if (key.tag, key.value) in lines:
            name = f"{key.value} " if is_name(key.value) else ""
            first = lines[key.tag, key.value]
            raise _Wrong(key.start_mark, f"the key {name}stands twice, first in line {first}; leave one of them out")
        lines[key.tag, key.value] = key.start_mark.line + 1


def _place(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or "") if isinstance(error, OSError) else "its name is none that a file can have"
