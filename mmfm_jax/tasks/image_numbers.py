"""Regression of simple numbers of the image, such as volume and surface, from its tokens: supervision without labels.

As MaskFeat does with histograms of gradients (arXiv:2112.09133), and radiomics with all of them.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float

from mmfm_jax.config.model import ModelConfig
from mmfm_jax.data.batch import Array, InputSpec
from mmfm_jax.errors import UserError
from mmfm_jax.losses.image_numbers import NAMES, image_numbers
from mmfm_jax.losses.mean import Mean
from mmfm_jax.metrics.findings import Findings, Forest
from mmfm_jax.metrics.held_out import HeldOut
from mmfm_jax.metrics.statistics import Statistic, Weights, explained_variance
from mmfm_jax.model.layers import Linear
from mmfm_jax.model.pool import AttentionPool
from mmfm_jax.tasks.base import Losses, Needs, Task, TaskConfig, Views


class ImageNumbersConfig(TaskConfig):
    """Size, extents, surface, shape and intensities of every image that is not packed, by `losses/image_numbers.py`."""

    kind: Literal["image_numbers"] = "image_numbers"
    """Which task it is."""

    def needs(self) -> Needs:
        return Needs(modalities={"kind": ("image",)})


class ImageNumbers(Task):
    Config = ImageNumbersConfig
    config: ImageNumbersConfig

    def __init__(self, name: str, config: ImageNumbersConfig, model: ModelConfig, spec: InputSpec, rngs: nnx.Rngs):
        super().__init__(name, config, model, spec, rngs)
        self.roles = tuple(role for role, shape in spec.images.items() if shape.pack is None)
        if not self.roles:
            raise UserError(f"tasks.{name}: measures images that are not packed, and all are; leave one unpacked")
        vision = model.vision
        self.pool = nnx.Dict({role: AttentionPool(vision.width, vision.heads, rngs) for role in self.roles})
        self.channels = {role: spec.images[role].channels for role in self.roles}
        self.head = nnx.Dict(
            {
                role: Linear(vision.width, self.channels[role] * len(NAMES), ("width", None), rngs, bias=True)
                for role in self.roles
            }
        )

    def _said(self, views: Views, role: str) -> Float[Array, "batch channel number"]:
        said = self.head[role](self.pool[role](views.encoded[f"image/{role}"])).astype(jnp.float32)
        return said.reshape(len(said), self.channels[role], len(NAMES))

    def loss(self, views: Views, keys) -> Losses:
        """Mean over numbers of the error: squared up to a deviation, absolute beyond (Huber)."""
        losses = {}
        for role in self.roles:
            part = views.batch.images[role]
            error = optax.huber_loss(self._said(views, role), image_numbers(part.voxels, part.spacing_mm))
            losses[f"image/{role}"] = Mean.over(error.mean(axis=(1, 2)), part.present)
        return Losses(losses)

    def predict(self, views: Views) -> dict[str, Array]:
        """By role, and as `ROLE_target` and `ROLE_present`."""
        found = {}
        for role in self.roles:
            part = views.batch.images[role]
            found[role] = self._said(views, role)
            found[f"{role}_target"] = image_numbers(part.voxels, part.spacing_mm)
            found[f"{role}_present"] = part.present
        return found

    def measure(self, held_out: HeldOut) -> Findings:
        """Share of the variance that is explained, of each number of the first channel and as their mean."""
        measures = {}
        for role in self.roles:
            kept = held_out.predicted[f"{role}_present"]
            said, true = (held_out.predicted[name][kept].astype(np.float64) for name in (role, f"{role}_target"))
            patients = held_out.test.patients[kept]
            if not kept.any():
                continue
            each = [functools.partial(explained_variance, said[:, 0, i], true[:, 0, i]) for i in range(len(NAMES))]
            measures[f"{self.name}/{role}/r2"] = held_out.bootstrap(functools.partial(_mean, each), patients)
            for name, statistic in zip(NAMES, each):
                measures[f"{self.name}/{role}/{name}/r2"] = held_out.bootstrap(statistic, patients)
        note = "Share of the variance of a number that the image's tokens tell; 1 is all, 0 is what the mean would do."
        return Findings(measures, (Forest("Numbers of the image", note, "share explained", measures, 0.0),))


def _mean(statistics: list[Statistic], weights: Weights) -> Float[np.ndarray, "resample"]:
    """Over those that are defined; NaN where none is."""
    each = np.stack([statistic(weights) for statistic in statistics])
    defined = np.isfinite(each)
    count = defined.sum(axis=0)
    total = np.where(defined, each, 0).sum(axis=0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
