"""Sections of a report, told by its headings."""

from __future__ import annotations

import re

_SAME = {
    "findings": "findings, finding, description, report, body of report",
    "impression": "impression, impressions, conclusion, conclusions, opinion, summary, assessment, diagnosis",
    "indication": "indication, indications, clinical indication, reason for exam, reason for examination, "
    "reason for study, history, clinical history, clinical information, clinical data",
    "technique": "technique, procedure, protocol, method",
    "comparison": "comparison, comparisons, prior study, prior studies",
    "recommendation": "recommendation, recommendations, plan",
    "examination": "examination, exam, study, type of exam",
    "addendum": "addendum",
}
_NAME_OF = {heading: name for name, headings in _SAME.items() for heading in headings.split(", ")}
_HEADING = re.compile(r"(?m)^[ \t]*([A-Za-z][A-Za-z /&-]{2,40}?)[ \t]*(?::|$)")


def section(text: str, wanted: str) -> str | None:
    """The part of a report under a heading, without it; None when the report has no such heading.

    A heading stands at the start of a line and ends with a colon or the line: a known word in any case, `wanted`,
    or any words in capitals. Known headings that mean the same (impression, conclusion) are one. Parts under the same
    heading are joined.
    """
    wanted = wanted.strip().lower()
    wanted = _NAME_OF.get(wanted, wanted)
    parts, start, inside = [], 0, False
    for found in _HEADING.finditer(text):
        words = " ".join(found.group(1).split())
        name = _NAME_OF.get(words.lower(), words.lower())
        known = name in _SAME or name == wanted
        if not (known or words.isupper()):
            continue
        if not found.group(0).rstrip().endswith(":") and not words.isupper():
            continue  # a line of plain words is no heading
        if inside:
            parts.append(text[start : found.start()])
        inside, start = name == wanted, found.end()
    if inside:
        parts.append(text[start:])
    joined = "\n".join(part.strip() for part in parts if part.strip())
    return joined or None
