"""The LIDC rating scales in their own words: reports, prompts and labels from the numbers that readers gave.

Scales: McNitt-Gray et al. 2007, doi:10.1016/j.acra.2007.07.021, and the LIDC-IDRI pages of The Cancer Imaging Archive,
which also say that in about 100 of the earliest cases the scales of lobulation and spiculation were used
inconsistently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from mmfm_jax.data.study import LabelSpec

# Characteristic: its sentence, and the words for ratings 1, 2, ... Malignancy is left out: it is what models predict.
SCALES: dict[str, tuple[str, tuple[str, ...]]] = {
    "subtlety": (
        "The nodule is {}.",
        ("extremely subtle", "moderately subtle", "fairly subtle", "moderately obvious", "obvious"),
    ),
    "internal_structure": ("The internal structure is {}.", ("soft tissue", "fluid", "fat", "air")),
    "calcification": (
        "Calcification is {}.",
        ("popcorn", "laminated", "solid", "non-central", "central", "absent"),
    ),
    "sphericity": ("The shape is {}.", ("linear", "ovoid/linear", "ovoid", "ovoid/round", "round")),
    "margin": ("The margin is {}.", ("poorly defined", "near poorly defined", "medium", "near sharp", "sharp")),
    "lobulation": ("Lobulation is {}.", ("none", "nearly none", "medium", "near marked", "marked")),
    "spiculation": ("Spiculation is {}.", ("none", "nearly none", "medium", "near marked", "marked")),
    "texture": ("The texture is {}.", ("non-solid", "non-solid/mixed", "part solid/mixed", "solid/mixed", "solid")),
}
MALIGNANCY = "malignancy"


def on_scale(characteristic: str, rating: int | None) -> bool:
    """Whether a rating is one that the scale of the characteristic has."""
    top = len(SCALES[characteristic][1]) if characteristic in SCALES else 5
    return rating is not None and 1 <= rating <= top


def sentence(characteristic: str, rating: int) -> str:
    """One rating in words, ending in a period: `sentence("spiculation", 5)` is "Spiculation is marked."."""
    template, words = SCALES[characteristic]
    return template.format(words[rating - 1])


def report(ratings: Mapping[str, int]) -> str:
    """One reader's ratings as text, a sentence each, joined by a space; malignancy does not enter."""
    return " ".join(sentence(name, ratings[name]) for name in SCALES if name in ratings)


LABELS: dict[str, LabelSpec] = {
    "malignancy": LabelSpec(
        classes=("benign", "malignant"),
        description="Median malignancy rating: at most 2 benign, at least 4 malignant, otherwise unlabelled.",
    ),
    "spiculation": LabelSpec(
        classes=("absent", "present"),
        description="Median spiculation rating: at most 2 absent, at least 3 present, otherwise unlabelled.",
        from_text="report",
    ),
    "lobulation": LabelSpec(
        classes=("absent", "present"),
        description="Median lobulation rating: at most 2 absent, at least 3 present, otherwise unlabelled.",
        from_text="report",
    ),
    "calcification": LabelSpec(
        classes=("absent", "present"),
        description="More than half of the readers saw no calcification: absent; more than half saw some: present.",
        from_text="report",
    ),
    "margin": LabelSpec(
        classes=("poorly defined", "sharp"),
        description="Median margin rating: at most 2 poorly defined, at least 4 sharp, otherwise unlabelled.",
        from_text="report",
    ),
}
_BOUNDS = {"malignancy": (2, 4), "spiculation": (2, 3), "lobulation": (2, 3), "margin": (2, 4)}


def labels(readings: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Classes of a nodule from its readers' ratings; a label that they leave open is missing."""
    found: dict[str, int] = {}
    for name, (low, high) in _BOUNDS.items():
        given = [ratings[name] for ratings in readings if name in ratings]
        if not given:
            continue
        middle = median(given)
        if middle <= low or middle >= high:
            found[name] = int(middle >= high)
    seen = [ratings["calcification"] != 6 for ratings in readings if "calcification" in ratings]
    if 2 * sum(seen) != len(seen):  # a majority, for kinds of calcification have no order to take a median of
        found["calcification"] = int(2 * sum(seen) > len(seen))
    return found
