"""Removes from report text what may identify: by rule, and by the identifiers that are known of the patient.

Rules lean to removing too much: a number of five digits or more is taken for a record number, capitalised words after
`Dr.` for a name. They do not understand language. A name in running text that no identifier, title or label announces
is not found, so text stays a risk; `docs/privacy.md` says so. Measurements (`3.5 x 2.1 cm`, `120 HU`) and short numbers
stay.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable

from mmfm_jax.data.deid.scrub_rules import FIRST, THEN, compiled

_FIRST, _THEN = compiled(FIRST), compiled(THEN)
_SHORTEST_KNOWN = 3
_TOO_COMMON = frozenset(
    [
        "the",
        "and",
        "for",
        "with",
        "not",
        "chest",
        "head",
        "left",
        "right",
        "upper",
        "lower",
        "unknown",
        "none",
        "anonymous",
        "male",
        "female",
        "other",
    ]
)


def scrub(text: str, known: Iterable[str] = ()) -> str:
    """The text with what may identify replaced by `[NAME]`, `[DATE]`, `[ID]` and so on.

    `known`: identifiers of the patient as `spellings` gives them, found in any case and with any space or punctuation
    between their parts.
    """
    text = _apply(_FIRST, unicodedata.normalize("NFC", text))
    if pattern := _known_pattern(known):
        text = pattern.sub("[REMOVED]", text)
    return _apply(_THEN, text)


def _apply(rules: tuple[tuple[str, re.Pattern[str]], ...], text: str) -> str:
    for replacement, rule in rules:
        text = rule.sub(replacement, text)
    return text


def spellings(value: str, person: bool) -> set[str]:
    """How text may repeat an identifier: as a whole, and of a person's name each word of three letters or more.

    `value`: as a header or table has it; DICOM's `Doe^Jane` too.
    """
    words = _words(value)
    bare = [re.sub(r"\W", "", word) for word in words]  # as those write who leave the accents out
    found = {
        word for word in (*words, *bare) if person and len(word) >= _SHORTEST_KNOWN and word.lower() not in _TOO_COMMON
    }
    for whole in (words, bare):
        if sum(map(len, whole)) >= _SHORTEST_KNOWN and " ".join(whole).lower() not in _TOO_COMMON:
            found.add(" ".join(whole))
    return found


def _words(value: str) -> list[str]:
    return _word().findall(unicodedata.normalize("NFC", value))


@functools.cache
def _word() -> re.Pattern[str]:
    """Accents and vowel signs that stand apart from their letter are part of a word too, which `re` does not know."""
    marks = (chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
    return re.compile(rf"\w[\w{''.join(marks)}]*")


def _known_pattern(known: Iterable[str]) -> re.Pattern[str] | None:
    found = set()
    for value in known:
        found.add(r"[\W_]*".join(map(re.escape, _words(value))))
    found.discard("")
    if not found:
        return None
    longest_first = sorted(found, key=lambda pattern: (-len(pattern), pattern))
    return re.compile(rf"(?i)(?<![^\W_])(?:{'|'.join(longest_first)})(?:'s|\u2019s)?(?![^\W_])")
