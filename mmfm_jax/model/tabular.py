"""The table encoder: one token a column, whatever its kind, and no order among them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, PRNGKeyArray

from mmfm_jax.config.model import TableConfig
from mmfm_jax.data.batch import Array, InputSpec, TablePart
from mmfm_jax.model.layers import Table
from mmfm_jax.model.parameter import parameter
from mmfm_jax.model.transformer import Transformer

FREQUENCY_SD = 0.5  # turns per standard deviation of the number, at initialisation


class NumberEmbedding(nnx.Module):
    """Sines and cosines at learned frequencies, then a linear map and ReLU a column (PLR, arXiv:2203.05556)."""

    def __init__(self, columns: int, frequencies: int, width: int, rngs: nnx.Rngs):
        turns = FREQUENCY_SD * jax.random.normal(rngs.params(), (columns, frequencies))
        scale = (2 * frequencies + 1) ** -0.5
        kernel = scale * jax.random.normal(rngs.params(), (columns, 2 * frequencies + 1, width))
        self.turns = parameter(turns, "frequency", (None, None))
        self.kernel = parameter(kernel, "matrix", (None, None, "width"))
        self.bias = parameter(jnp.zeros((columns, width)), "bias", (None, "width"))

    def __call__(self, numbers: Float[Array, "batch column"]) -> Float[Array, "batch column width"]:
        angle = 2 * np.pi * numbers[:, :, None] * self.turns[...]
        waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle), numbers[:, :, None]], axis=-1)
        return jax.nn.relu(jnp.einsum("bcf,cfw->bcw", waves, self.kernel[...]) + self.bias[...])


class TableEncoder(nnx.Module):
    """Columns in the order numbers, then categories."""

    def __init__(self, config: TableConfig, spec: InputSpec, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes = [len(vocabulary) for vocabulary in spec.categories.values()]
        columns = len(spec.numbers) + len(sizes)
        self.dtype = dtype
        self.numbers = (
            NumberEmbedding(len(spec.numbers), config.frequencies, config.width, rngs) if spec.numbers else None
        )
        self.categories = Table(sum(sizes), config.width, rngs, kind="embedding") if sizes else None
        self.first_entry = tuple(int(first) for first in np.cumsum([0, *sizes[:-1]])) if sizes else ()
        self.column = Table(columns, config.width, rngs, kind="position")
        self.missing = Table(columns, config.width, rngs, kind="token")
        self.masked = Table(columns, config.width, rngs, kind="token")
        self.transformer = Transformer(config, rngs)

    def __call__(
        self, table: TablePart, hidden: Bool[Array, "batch column"] | None = None, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "batch column width"]:
        """Tokens of the columns; a `hidden` one shows neither its value nor whether it is missing.

        `keys`: one a study, of noise in training."""
        parts = []
        if self.numbers is not None:
            parts.append(self.numbers(table.numbers))
        if self.categories is not None:
            parts.append(self.categories(table.categories + np.array(self.first_entry)))
        held = jnp.concatenate([table.number_present, table.category_present], axis=1)
        x = jnp.where(held[:, :, None], jnp.concatenate(parts, axis=1), self.missing.all)
        if hidden is not None:
            x = jnp.where(hidden[:, :, None], self.masked.all, x)
        return self.transformer((x + self.column.all).astype(self.dtype), keys=keys)
