"""Which images must be looked at before they are taken: faces that could be rebuilt, text burned into pixels."""

from __future__ import annotations

import re

from mmfm_jax.data.readers.dicom import Header

_TEXT_MODALITIES = {"US", "IVUS", "OT", "SC", "XC", "ES", "GM", "HC", "DOC", "IO", "PX", "OP", "OPT", "SM", "RF", "XA"}
"""Modalities whose machines write into the picture, or which are photographs and captures."""
_VOLUMES_OF_BODIES = {"CT", "MR", "PT", "NM"}
_PHOTOGRAPHS = {"XC", "ES", "GM", "OT", "SC"}
_HEAD = re.compile(
    r"(?i)head|brain|skull|face|facial|sinus|orbit|nose|nasal|maxill|mandib|cranio|cerebr|neuro|pituitary|temporal|ear\b|"
    r"\biac|neck|whole.?body|hnc|dental|teeth|jaw|\beye|kopf|schädel|tete\b|cabeza"
)
_NO_TEXT, _NO_FACE = "NO", "NO"


def suspicions(header: Header | None, modality: str, body_part: str) -> list[str]:
    """Why an image should be looked at before it is taken: `burned_in_text`, `face`.

    `header` is None for formats that say nothing of what they show; `modality` and `body_part` are then all that is
    known, and what is not known counts as suspect. What a header says is believed over what the role declares, except
    that a head stays a head: any sign of one is enough.
    """
    found = []
    if header is not None:
        modality = header.modality or modality
    modality = modality.upper()
    said = header.burned_in if header is not None else ""
    secondary = header is not None and header.secondary
    if said == "YES" or (said != _NO_TEXT and (secondary or not modality or modality in _TEXT_MODALITIES)):
        found.append("burned_in_text")
    recognisable = header.recognisable if header is not None else ""
    if recognisable == "YES" or (recognisable != _NO_FACE and _may_show_face(header, modality, body_part)):
        found.append("face")
    return found


def _may_show_face(header: Header | None, modality: str, body_part: str) -> bool:
    if not modality or modality in _PHOTOGRAPHS:
        return True
    if modality not in _VOLUMES_OF_BODIES:  # a radiograph, an ultrasound, a slide: no surface to rebuild
        return False
    words = f"{body_part} {header.body_part} {header.body_words}" if header is not None else body_part
    known = body_part or (header.body_part if header is not None else "")
    return not known.strip() or bool(_HEAD.search(words))
