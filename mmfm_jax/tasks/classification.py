"""Classification of a label from the fused latents; studies without the label are ignored."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Float

from mmfm_jax.config.base import Probability
from mmfm_jax.config.model import ModelConfig
from mmfm_jax.data.batch import Array, InputSpec
from mmfm_jax.errors import UserError
from mmfm_jax.losses.mean import mean_where
from mmfm_jax.model.layers import Linear, RMSNorm
from mmfm_jax.tasks.base import Metrics, Task, TaskConfig, Views


class ClassificationConfig(TaskConfig):
    """Cross-entropy of one of the store's labels."""

    kind: Literal["classification"] = "classification"
    label: str
    smoothing: Probability = 0.0
    """Share of the target spread over all classes (arXiv:1512.00567)."""


class Classification(Task):
    Config = ClassificationConfig
    config: ClassificationConfig

    def __init__(self, name: str, config: ClassificationConfig, model: ModelConfig, spec: InputSpec, rngs: nnx.Rngs):
        super().__init__(name, config, model, spec, rngs)
        if config.label not in spec.labels:
            held = ", ".join(spec.labels) or "none"
            raise UserError(f"tasks.{name}.label: the store has no label {config.label}; it has {held}")
        self.norm = RMSNorm(model.fusion.width)
        self.head = Linear(model.fusion.width, len(spec.labels[config.label]), ("width", None), rngs, bias=True)

    def logits(self, latents: Float[Array, "batch latent width"]) -> Float[Array, "batch label_class"]:
        return self.head(self.norm(latents.astype(jnp.float32).mean(axis=1)))

    def loss(self, views: Views, rng: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        label = views.batch.labels[self.config.label]
        logits = self.logits(views.latents)
        target = optax.smooth_labels(jax.nn.one_hot(label.value, logits.shape[-1]), self.config.smoothing)
        loss = mean_where(optax.softmax_cross_entropy(logits, target), label.present)
        right = (logits.argmax(axis=-1) == label.value).astype(jnp.float32)
        return loss, {"accuracy": mean_where(right, label.present)}
