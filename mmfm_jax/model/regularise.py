"""Dropout and stochastic depth of a stack's branches, in training alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PRNGKeyArray

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.data.batch import Array


@dataclass(frozen=True)
class Noise:
    """Of all blocks of a stack. A token's is drawn from its study's key, its place among the study's tokens, block and
    branch alone: no mesh, no part of a batch, no neighbour in a packed row and no recomputation changes it."""

    of_study: PRNGKeyArray
    """The key of each token's study [row token]; [row 1] where a row is a study."""
    of_token: PRNGKeyArray
    """A key a token [row token]."""
    config: TransformerConfig

    def __call__(
        self, block: Int[Array, ""] | int, branch: int, x: Float[Array, "row token width"]
    ) -> Float[Array, "row token width"]:
        """What is left of `x`, the branch of that number in that block; its expectation is `x`."""
        number = BRANCHES * block + branch
        if self.config.dropout:
            x = dropped(x, fold(self.of_token, number), self.config.dropout)
        if self.config.drop_path:
            chance = self.config.drop_path * block / max(self.config.depth - 1, 1)  # as in timm
            x = dropped(x, fold(self.of_study, number), chance, whole=True)
        return x


BRANCHES = 3  # of a block at most: cross-attention, attention and MLP


def noise_of(
    keys: PRNGKeyArray, segment: Int[Array, "row token"] | None, tokens: tuple[int, ...], config: TransformerConfig
) -> Noise:
    """Of `tokens` [row, token] by `keys`, one a study [batch]. Study i is in row i // studies of a row, as segment
    1 + i % studies."""
    rows, length = tokens
    studies = len(keys) // rows
    of_study, place = keys.reshape(rows, studies), jnp.broadcast_to(jnp.arange(length), tokens)
    if studies > 1 and segment is not None:
        own = segment[:, None, :] == 1 + jnp.arange(studies)[:, None]
        place = jnp.where(own, jnp.cumsum(own, axis=2) - 1, 0).sum(axis=1)
        of_study = jax.vmap(lambda keys, study: keys[study])(of_study, jnp.maximum(segment - 1, 0))
    of_token = jax.vmap(jax.vmap(jax.random.fold_in))(jnp.broadcast_to(fold(of_study, 0), tokens), place)
    return Noise(fold(of_study, 1), of_token, config)


def dropped(
    x: Float[Array, "*vector width"], keys: PRNGKeyArray, chance: Float[Array, ""] | float, whole: bool = False
) -> Float[Array, "*vector width"]:
    """Each feature, or each vector as a `whole`, set to zero with `chance`, and the others divided by 1 - chance.

    `keys`: one a vector, or of size 1 where vectors share their fate."""

    def kept(key):
        return jax.random.bernoulli(key, 1 - chance, (1 if whole else x.shape[-1],))

    return jnp.where(_each(kept, keys), x.astype(jnp.float32) / (1 - chance), 0).astype(x.dtype)


def fold(keys: PRNGKeyArray | None, number: Int[Array, ""] | int) -> Any:
    """Of each key, one for another use; of None, for no noise, None."""
    return None if keys is None else _each(lambda key: jax.random.fold_in(key, number), keys)


def _each(function, keys: PRNGKeyArray):
    """A function of one key, of all."""
    for _ in range(keys.ndim):
        function = jax.vmap(function)
    return function(keys)
