"""Which patches of an image masked modelling hides (MAE, arXiv:2111.06377): a share of each study's, at random."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray

from mmfm_jax.data.batch import Array, PackedPart


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


def hide(part: PackedPart, share: float, most: int, keys: PRNGKeyArray) -> tuple[PackedPart, PackedPart]:
    """A part in two: the patches that stay, and those hidden, each in as few tokens as always suffice.

    `most`: patches of the largest image; `keys`: one a study [batch]. What is hidden of a study depends on its key and
    on the number of its patches, not on its neighbours.
    """
    score = jax.vmap(lambda key: jax.random.uniform(key, (most,)))(keys)
    hidden = lowest(part, score, np.array([hidden_of(n, share) for n in range(most + 1)]))
    tokens, whole = part.patches.shape[1], part.segment is None
    shown_tokens, hidden_tokens = buffers(tokens, None if whole else part.studies, share, most)
    return take(part, part_of(part) & ~hidden, shown_tokens), take(part, hidden, hidden_tokens)


def lowest(part: PackedPart, score: Float[Array, "batch most"], count: np.ndarray) -> Bool[Array, "row token"]:
    """The tokens of lowest score: of a study with n patches `count[n]`; its i-th patch has its i-th score."""
    rows, tokens = part.patches.shape[:2]
    segment = jnp.ones((rows, tokens), jnp.int32) if part.segment is None else part.segment
    held = (segment[:, None, :] == 1 + jnp.arange(part.studies)[:, None]).sum(axis=2)
    first = part.by_token((jnp.cumsum(held, axis=1) - held).reshape(-1))
    most = score.shape[1]
    place = jnp.clip(jnp.arange(tokens) - first, 0, most - 1)
    index = jnp.maximum(segment - 1, 0) * most + place
    own = jnp.take_along_axis(score.reshape(rows, -1), index, axis=1)
    order = jnp.lexsort((own, jnp.where(segment > 0, segment, part.studies + 1)))
    rank = jnp.argsort(order, axis=1) - first
    return (segment > 0) & (rank < part.by_token(jnp.asarray(count)[held].reshape(-1)))


def part_of(part: PackedPart) -> Bool[Array, "row token"]:
    """Tokens that are not padding."""
    return jnp.ones(part.patches.shape[:2], bool) if part.segment is None else part.segment > 0


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


def take(part: PackedPart, chosen: Bool[Array, "row token"], tokens: int) -> PackedPart:
    """The chosen tokens alone, in their order, in rows of `tokens` tokens."""
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :tokens]
    patches, centres = (jnp.take_along_axis(x, order[..., None], axis=1) for x in (part.patches, part.centres_mm))
    segment = None
    if part.segment is not None:
        segment = jnp.take_along_axis(jnp.where(chosen, part.segment, 0), order, axis=1)
    return PackedPart(patches, centres, segment, part.present)
