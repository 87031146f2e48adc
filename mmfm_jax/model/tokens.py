"""Tokens of studies, of which several may stand side by side in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from mmfm_jax.data.batch import Array
from mmfm_jax.model.flash import Segments
from mmfm_jax.parallel.sharding import lacking


@dataclass(frozen=True)
class Tokens:
    """What an encoder makes of one part of a study: `image/ROLE`, `text/FIELD` or `table`.

    Study i of the batch is in row i // studies, as segment 1 + i % studies.
    """

    x: Float[Array, "row token width"]
    segment: Shaped[Array, "row token"]
    """The study of each token, counted from 1 in its row (True is 1); 0 is absent."""
    studies: int = 1
    """Of a row."""

    @property
    def present(self) -> Bool[Array, "row token"]:
        return self.segment > 0

    @property
    def held(self) -> Bool[jax.Array, "batch"]:
        """Which studies have any token."""
        of_study = self.segment[:, None, :] == 1 + jnp.arange(self.studies)[:, None]
        return of_study.any(axis=2).reshape(-1)

    def of(self, studies: Bool[Array, "batch"]) -> Tokens:
        """The same with the tokens of all but these studies absent."""
        index = jnp.maximum(jnp.asarray(self.segment, jnp.int32) - 1, 0)
        kept = jnp.take_along_axis(studies.reshape(len(self.segment), self.studies), index, axis=1)
        return Tokens(self.x, jnp.where(kept, self.segment, 0), self.studies)

    def in_rows_of(self, studies: int) -> Tokens:
        """Rows of one study joined to rows of several."""
        if self.studies == studies:
            return self
        place = 1 + jnp.arange(len(self.segment))[:, None] % studies
        segment = jnp.where(self.present, place, 0).reshape(-1, studies * self.segment.shape[1])
        return Tokens(self.x.reshape(len(segment), -1, self.x.shape[-1]), segment, studies)

    def padded(self) -> Tokens:
        """With absent tokens behind, as many as it takes for the mesh in force to split them all."""
        behind = (0, 0), (0, lacking("tokens", self.x.shape[1]))
        return Tokens(jnp.pad(self.x, (*behind, (0, 0))), jnp.pad(self.segment, behind), self.studies)

    def seen_by(self, queries: int) -> Segments:
        """For attention of `queries` queries of each study, side by side in the rows of these tokens."""
        segment = jnp.asarray(self.segment, jnp.int32)
        if self.studies == 1:
            return Segments(None, segment)
        of_queries = jnp.repeat(1 + jnp.arange(self.studies, dtype=jnp.int32), queries)
        return Segments(jnp.broadcast_to(of_queries, (len(segment), len(of_queries))), segment)


def join(parts: Sequence[Tokens]) -> Tokens:
    """Parts of one width side by side, in rows of as many studies as the fullest has."""
    studies = max(part.studies for part in parts)
    parts = [part.in_rows_of(studies) for part in parts]
    return Tokens(
        jnp.concatenate([part.x for part in parts], axis=1),
        jnp.concatenate([jnp.asarray(part.segment, jnp.int32) for part in parts], axis=1),
        studies,
    )
