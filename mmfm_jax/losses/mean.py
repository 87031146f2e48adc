"""Means as sums and counts, which add up over parts of a batch, devices, processes and batches and are divided once."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from mmfm_jax.data.batch import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A sum and how much it is of. A mean of means is right only where all are of equally many; two sums and two counts
    always add up."""

    total: Float[Array, ""]
    count: Num[Array, ""]

    @classmethod
    def over(cls, value: Float[Array, "*shape"], present: Array) -> Mean:
        """Of the values that are present. What is absent has no part in value or gradient, even if NaN."""
        return cls(jnp.where(present, value, 0).sum(), jnp.broadcast_to(present, value.shape).sum())

    @classmethod
    def of(cls, value: Float[Array, ""]) -> Mean:
        """Of one number that is the same whatever the batch holds."""
        return cls(value, jnp.ones((), jnp.int32))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Float[Array, ""]:
        """0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1)


def mean_where(value: Float[Array, "*shape"], present: Array) -> Float[Array, ""]:
    """Mean over what is present; 0 when nothing is."""
    return Mean.over(value, present).value
