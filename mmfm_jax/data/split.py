"""Splits patients, and hides who they are, by keyed hashes.

Both are HMAC-SHA256 of the patient's identifier under one key, in different contexts. A patient's split depends on that
patient and the key alone, so it stays when others are added, and all that a patient has falls into one split. Without
the key the pseudonym cannot be matched to an identifier, so for data that is not public the key is a secret.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from math import isclose

from mmfm_jax.errors import UserError

FRACTIONS: Mapping[str, float] = {"train": 0.75, "validation": 0.05, "test": 0.20}


def split_of(patient_id: str, key: str, fractions: Mapping[str, float] = FRACTIONS) -> str:
    """The split that a patient falls into, by chance in proportion to `fractions`.

    Raises UserError when the key is empty or the fractions are not shares of 1.
    """
    if not fractions or min(fractions.values()) < 0 or not isclose(sum(fractions.values()), 1, abs_tol=1e-9):
        raise UserError(f"split fractions {dict(fractions)} are not shares of 1; make them sum to 1")
    draw = int.from_bytes(digest(patient_id, key, "split")[:8], "big") / 2**64  # uniform in [0, 1)
    reached = 0.0
    for name, share in fractions.items():
        reached += share
        if draw < reached:
            return name
    return [name for name, share in fractions.items() if share > 0][-1]  # the sum may round to just under the draw


def pseudonym(patient_id: str, key: str) -> str:
    """32 hex digits that stand for a patient."""
    return digest(patient_id, key, "patient").hex()[:32]


def share_of(patient: str) -> int:
    """A patient's place among all, 0 to 2^32 - 1, by a hash of the pseudonym, so it stays when others are added.

    The patients below share * 2^32 are a share, and of every larger one.
    """
    return int.from_bytes(digest(patient, "mmfm", "share")[:4], "big")


def fingerprint(key: str) -> str:
    """16 hex digits by which two stores can be seen to share a key."""
    return digest("", key, "fingerprint").hex()[:16]


def digest(text: str, key: str, context: str) -> bytes:
    """HMAC-SHA256 of a text under a key; hashes of different contexts cannot be matched to each other.

    Raises UserError when the key is empty.
    """
    if not key:
        raise UserError("the split key is empty; give any text, and keep it secret where patients must stay unknown")
    return hmac.digest(key.encode(), f"{context}\0{text}".encode(), "sha256")
