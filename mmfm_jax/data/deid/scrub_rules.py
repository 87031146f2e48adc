"""The rules of the report scrubber, in the order in which they are applied.

All repetitions that could start at every character are bounded, so that no text takes more than linear time by much.
"""

from __future__ import annotations

import re


def _words(phrases: str) -> str:
    """Any of the phrases between bars, in any case, with any space between their words."""
    return "(?i:" + "|".join(phrase.strip().replace(" ", r"[ \t]+") for phrase in phrases.split("|")) + ")"


_SPACE = r"[ \t]*"
_CAPITAL = r"(?:[^\W\d_a-zà-öø-ÿ][\w'\u2019-]{1,40}|[^\W\d_a-zà-öø-ÿ]\.)"  # a word with a capital, or an initial
_PARTICLE = r"(?:(?:van|von|de|der|den|la|di|da|al|el|bin)[ \t]+)"
_NAME = (
    rf"(?!(?:Dr|Mr|Mrs|Ms|Prof)\b){_PARTICLE}{{0,3}}{_CAPITAL}(?:{_SPACE},{_SPACE}{_CAPITAL})?"
    rf"(?:[ \t]+{_PARTICLE}{{0,3}}{_CAPITAL}){{0,3}}"
)
_TITLE = r"(?:Drs?|Mrs?|Ms|Miss|Prof|Professor|Doctor|Nurse|Sister)\b\.?"
_DONE = (
    "signed|dictated|transcribed|reported|read|verified|approved|interpreted|reviewed|requested|ordered|referred"
    "|performed"
)
_PERSON = _words(
    f"patient|patient's|patient name|patient's name|name|surname|given name|maiden name|first name|last name|physician"
    "|radiologist|referrer|referring|referring physician|referring doctor|referring provider|referring clinician"
    "|attending|attending physician|resident|fellow|surgeon|technologist|provider|clinician|discussed with|notified|cc"
    f"|from|to|attn|next of kin|mother|father|spouse|contact|{_DONE}|{' by|'.join(_DONE.split('|'))} by"
)
_DOING = _words(
    f"{' by|'.join(_DONE.split('|'))} by|seen by|discussed with|reviewed with|communicated to|reported to|conveyed to"
    "|named"
)
_DEGREE = r"(?:M\.?D\.?|MBBS|FRCR|D\.?O\.?|Ph\.?D\.?|R\.?N\.?|RT\(R\))(?!\w)"

_NUMBERED = _words(
    r"mrn|m\.r\.n\.|medical record|record|accession|acc|chart|account|acct|policy|member|beneficiary|health plan"
    r"|insurance|ssn|social security|license|licence|certificate|dea|npi|vin|plate|serial|s/n|sn|device|implant|lot"
    r"|passport|case|order|encounter|visit|patient|nhs|study id|exam id|badge|vehicle"
)
_NUMBER_SIGN = rf"{_SPACE}(?:\#|{_words('no|number|nr|num|id|plate')}\b\.?)?{_SPACE}[:#=]?{_SPACE}"
_NUMBER_ITSELF = r"(?:[A-Z]{1,4}[ -])?(?=[\w./-]{0,60}\d)\w(?:[\w./-]{0,60}\w)?"

_MONTH = (
    r"(?i:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sep(?:t(?:ember)?)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
_MONTH_NUMBER, _DAY, _YEAR = r"(?:0?[1-9]|1[0-2])", r"(?:0?[1-9]|[12]\d|3[01])", r"(?:19|20)\d{2}"
_DAY_OF = rf"{_DAY}(?i:st|nd|rd|th)?"
_CLOCK = r"(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d)?"
_OVER_89 = r"(?:9\d|1[0-4]\d)"

_STREET = _words(
    "street|st|avenue|ave|road|rd|drive|dr|lane|ln|boulevard|blvd|court|ct|way|place|pl|square|sq|terrace|ter|highway|hwy"
    "|parkway|pkwy|circle|cir"
)
_TELEPHONE = _words("tel|telephone|phone|fax|pager|beeper|ext|mobile|cell")

FIRST = (
    # These may hold names, so they come before the names that are known of the patient are looked for.
    ("EMAIL", r"[\w.+'-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}"),
    ("URL", r"(?i)\b(?:https?://|ftp://|www\.)[^\s<>\"')]+"),
)
# What is more telling comes first, bare numbers last. What a rule leaves in place is its group `keep`.
THEN = (
    ("ID", rf"(?P<keep>\b{_NUMBERED}\b{_NUMBER_SIGN}){_NUMBER_ITSELF}"),
    ("IP", r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)"),
    ("IP", r"(?i)(?<![\w:])(?:[0-9a-f]{1,4}:){3,7}:?[0-9a-f]{1,4}(?![\w:])"),
    ("ID", r"(?<![\w.])\d+(?:\.\d+){5,}(?!\w|\.\d)"),  # a DICOM UID
    ("ID", r"(?<!\d)\d{3}[- ]\d{2}[- ]\d{4}(?!\d)"),  # a social security number
    ("DATE", rf"(?<![\d./-])\d{{4}}[-/.]{_MONTH_NUMBER}[-/.]{_DAY}(?:[T ]{_CLOCK}(?:\.\d+)?)?(?![\d-])"),
    ("DATE", rf"(?<![\d./-]){_DAY}[-/.]{_DAY}[-/.](?:19|20)?\d{{2}}(?![\d/-])"),
    ("DATE", rf"\b{_DAY_OF}[ \t]*(?:of[ \t]+)?[-. ]?{_MONTH}(?:[-, ]*(?:{_YEAR}\b|'?\d{{2}}\b))?"),
    ("DATE", rf"\b{_MONTH}[ \t]+{_DAY_OF}\b(?:,?[ \t]*{_YEAR}\b)?"),
    ("DATE", rf"\b{_MONTH},?[ \t]+(?:of[ \t]+)?{_YEAR}\b"),
    ("DATE", rf"(?<![\d/]){_MONTH_NUMBER}/{_YEAR}(?![\d/])"),
    ("DATE", rf"(?P<keep>\b(?i:on|from|dated|of)[ \t]+){_MONTH_NUMBER}/{_DAY}(?![\d/])"),
    ("DATE", r"(?<!\d)(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)"),
    ("TIME", rf"(?<![\d:]){_CLOCK}(?i:[ \t]*[ap]\.?m\b\.?)?(?!\d)"),
    ("AGE", rf"(?<![\d.]){_OVER_89}(?=(?i:[- ]?(?:years?|yrs?|y)[- /]?(?:old|o\b)|[- ]?y/?o\b))"),
    ("AGE", rf"(?P<keep>\b(?i:age[ds]?)[ \t]*:?[ \t]*){_OVER_89}\b"),
    (
        "PHONE",
        r"(?<![\w.])(?:\+?\d{1,3}[-. ]?)?(?:\(\d{2,5}\)[-. ]?|\d{2,5}[-. /])\d{3,4}[-. ]?\d{3,4}"
        r"(?:[ \t]*(?:x|ext\.?)[ \t]*\d+)?(?!\w)",
    ),
    (
        "PHONE",
        rf"(?P<keep>\b{_TELEPHONE}\b\.?(?:{_SPACE}{_words('no|number')}\.?)?{_SPACE}[:#]?{_SPACE})"
        r"\+?[\d(][\d()\-. /]{1,30}\d",
    ),
    (
        "ADDRESS",
        rf"\b\d{{1,5}}[ \t]+(?:[NSEW]\.?[ \t]+)?(?:{_CAPITAL}[ \t]+){{1,3}}{_STREET}\b\.?"
        rf"(?:,?{_SPACE}{_words('apt|suite|unit|ste')}\.?{_SPACE}\w+)?",
    ),
    ("ADDRESS", rf"{_CAPITAL}(?:[ \t]+{_CAPITAL})?,?[ \t]+[A-Z]{{2}}[ \t]+\d{{5}}(?:-\d{{4}})?\b"),
    ("ADDRESS", rf"(?P<keep>\b{_words('zip|zip code|postal code|postcode')}{_SPACE}[:#]?{_SPACE})[\w-]{{4,10}}\b"),
    ("NAME", rf"(?P<keep>\b{_TITLE}[ \t]+){_NAME}"),
    ("NAME", rf"(?P<keep>\b{_PERSON}{_SPACE}:{_SPACE}(?:{_TITLE}[ \t]+)?){_NAME}"),
    ("NAME", rf"(?P<keep>\b{_DOING}[ \t]+(?:{_TITLE}[ \t]+)?){_NAME}"),
    ("NAME", rf"{_CAPITAL}(?:[ \t]+{_CAPITAL}){{1,3}}(?=,?{_SPACE}{_DEGREE})"),
    # Letters and four digits or more, such as AB-12345; not sizes, such as 512x512x300.
    (
        "ID",
        r"(?<![\w.-])(?!\d+(?:[xX]\d+)+\b)(?=(?:[A-Za-z_-]{0,20}\d){4})(?=[\d-]{0,40}[A-Za-z])\w[\w-]{5,}(?!\w)",
    ),
    ("ID", r"(?<![\w.])\d{5,}(?!\w|\.\d)"),
)


def compiled(rules: tuple[tuple[str, str], ...]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    """(replacement, pattern) of each rule."""
    made = []
    for kind, rule in rules:
        found = re.compile(rule)
        made.append((rf"\g<keep>[{kind}]" if "keep" in found.groupindex else f"[{kind}]", found))
    return tuple(made)
