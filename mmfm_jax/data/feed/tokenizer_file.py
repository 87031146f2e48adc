"""What a tokenizer.json of others may ask for before it is believed: no text that grows, no search without end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from mmfm_jax.errors import UserError

_MOST_GROWTH = 64
"""Characters that a normaliser may make of one."""
_REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[*+]|\{\d*,\d*\})")


def check_described(text: str, source: str) -> None:
    """Raises UserError for a tokenizer whose rules let text grow without bound or search it for ever.

    What is not JSON passes: the library says what is wrong with it.
    """
    try:
        described = json.loads(text)
        growth = 1
        for rule in _rules(described):
            if "content" in rule and rule.get("type") == "Replace":
                growth *= max(1, len(str(rule["content"])) + (not _literal(rule.get("pattern"))))
            if rule.get("type") == "Prepend":
                growth *= 1 + len(str(rule.get("prepend", ""))) // 16
            if growth > _MOST_GROWTH:
                raise UserError(f"{source}: its normaliser makes text grow without bound; use another tokenizer")
            pattern = rule.get("pattern")
            if isinstance(pattern, dict) and backtracks(str(pattern.get("Regex", ""))):
                raise UserError(f"{source}: a pattern of it may search for ever; use another tokenizer")
    except (ValueError, RecursionError):
        return


def backtracks(pattern: str) -> bool:
    """Whether a repeated group of a regular expression holds what is repeated itself, as in `(a+)*`."""
    for end in _REPEATED_GROUP.finditer(pattern):
        start = _opening(pattern, end.start())
        if re.search(r"(?<!\\)(?:[*+]|\{\d*,\d*\})(?!\+)", pattern[start : end.start()]):
            return True
    return False


def _opening(pattern: str, end: int) -> int:
    depth = 0
    for at in range(end, -1, -1):
        if at and pattern[at - 1] == "\\":
            continue
        depth += (pattern[at] == ")") - (pattern[at] == "(")
        if not depth:
            return at
    return 0


def _literal(pattern: Any) -> bool:
    return isinstance(pattern, dict) and bool(pattern.get("String"))


def _rules(described: Any) -> Iterator[dict]:
    """Every normaliser and splitter, also those within sequences and the decoder."""
    described = described if isinstance(described, dict) else {}
    left = [described.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    while left:
        rule = left.pop()
        if isinstance(rule, dict):
            yield rule
            left += [one for part in ("normalizers", "pretokenizers", "decoders") for one in rule.get(part) or ()]
