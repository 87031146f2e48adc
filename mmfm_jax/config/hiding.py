"""How many patches masked modelling hides, and the tokens that what is shown takes: numbers that need no device."""

from __future__ import annotations

import math

import numpy as np


def granule(patches: int) -> int:
    """What is shown of so many patches is a multiple of this power of two: of 512 and more at most a 256th of them, so
    that a share is off by no more than a 512th, and at most 128, which meshes and tiles of kernels divide."""
    return min(1 << max((patches // 256).bit_length() - 1, 0), 128)


def hidden_of(patches: int, share: float) -> int:
    """How many of an image's patches are hidden: at least one, and never all; none of a single one."""
    if patches < 2:
        return 0
    step = granule(patches)
    shown = round((patches - round(share * patches)) / step) * step
    return patches - min(max(shown, step), (patches - 1) // step * step)


def buffers(tokens: int, studies: int | None, share: float, most: int) -> tuple[int, int]:
    """Tokens of a row in which what is shown of its images, and what is hidden, always fits.

    `studies`: of a row of `tokens` tokens, each an image of at most `most` patches; None: one image that fills the row.
    """
    if studies is None:
        return tokens - hidden_of(tokens, share), hidden_of(tokens, share)
    patches = np.arange(min(tokens, most) + 1)
    hidden = np.array([hidden_of(n, share) for n in range(len(patches))])
    step = granule(tokens)

    def enough(count: np.ndarray, share: float) -> int:
        # A count is its share of the patches and what rounding adds, which is most where one of one patch is shown.
        rounded = (count - share * patches).max()
        bound = min(math.floor(share * tokens + studies * rounded + 1e-6), studies * int(count.max()))
        return min(-(-bound // step) * step, tokens)

    return enough(patches - hidden, 1 - share), enough(hidden, share)
