"""Classification of a label from the fused latents; studies without the label are ignored."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from mmfm_jax.config.base import Probability
from mmfm_jax.config.model import ModelConfig
from mmfm_jax.data.batch import Array, InputSpec
from mmfm_jax.errors import UserError
from mmfm_jax.losses.mean import Mean
from mmfm_jax.metrics.findings import Findings
from mmfm_jax.metrics.held_out import HeldOut, view_name, views_of
from mmfm_jax.metrics.label import Temperature, tell
from mmfm_jax.metrics.statistics import fitted_temperature, tempered
from mmfm_jax.model.layers import Linear, RMSNorm
from mmfm_jax.model.regularise import dropped
from mmfm_jax.tasks.base import Losses, Needs, Task, TaskConfig, Views

FIRST_TEXT = "first_text"
"""Follows the name of a view that is given one text of each field, where others are given all, one after the other."""


class ClassificationConfig(TaskConfig):
    """Cross-entropy of one of the store's labels."""

    kind: Literal["classification"] = "classification"
    """Which task it is."""
    label: str
    """Label of the store that is learnt."""
    smoothing: Probability = 0.0
    """Share of the target spread over all classes (arXiv:1512.00567)."""
    dropout: Probability = 0.0
    """Training only: chance of each feature that enters the head to be zero (JMLR 15:1929)."""
    without: tuple[Literal["image", "text", "table"], ...] | None = None
    """Modalities that the head is not shown. By default the texts if the label was read out of one (`from_text` of the
    label in the store), else none."""

    def needs(self) -> Needs:
        return Needs(labels={"label": self.label})


class Classification(Task):
    Config = ClassificationConfig
    config: ClassificationConfig

    def __init__(self, name: str, config: ClassificationConfig, model: ModelConfig, spec: InputSpec, rngs: nnx.Rngs):
        super().__init__(name, config, model, spec, rngs)
        of_text = ("text",) if config.label in spec.label_texts else ()
        self.denied = frozenset(of_text if config.without is None else config.without)
        if not set(spec.modalities) - self.denied:
            raise UserError(
                f"tasks.{name}.without: leaves the head none of the inputs ({', '.join(spec.modalities)}); "
                "add an input, or say what it may see by `without`"
            )
        self.modalities = spec.modalities
        self.norm = RMSNorm(model.fusion.width)
        self.head = Linear(model.fusion.width, len(spec.labels[config.label]), ("width", None), rngs, bias=True)

    def logits(
        self, latents: Float[Array, "batch latent width"], noise: PRNGKeyArray | None = None
    ) -> Float[Array, "batch label_class"]:
        """`noise`: keys of dropout, one a study."""
        x = self.norm(latents.astype(jnp.float32).mean(axis=1))
        return self.head(x if noise is None or not self.config.dropout else dropped(x, noise, self.config.dropout))

    def loss(self, views: Views, keys: PRNGKeyArray) -> Losses:
        label = views.batch.labels[self.config.label]
        logits = self.logits(views.fused(self.denied), views.noise(keys))
        target = optax.smooth_labels(jax.nn.one_hot(label.value, logits.shape[-1]), self.config.smoothing)
        loss = Mean.over(optax.softmax_cross_entropy(logits, target), label.present)
        right = (logits.argmax(axis=-1) == label.value).astype(jnp.float32)
        return Losses({"loss": loss}, {"accuracy": Mean.over(right, label.present)})

    def predict(self, views: Views) -> dict[str, Array]:
        """Log-probabilities [study, class] by view: `fused`, `fused_without_image`, ..."""
        return {
            view_name(view): jax.nn.log_softmax(self.logits(views.fused(view)).astype(jnp.float32))
            for view in views_of(self.modalities, self.denied)
        }

    def measure(self, held_out: HeldOut) -> Findings:
        """AUROC of the head on each view beside probes and baselines. Headline is the view that it learnt from."""
        label, headline = self.config.label, view_name(self.denied)
        given = held_out.all_texts or held_out.predicted
        scores = {name: tempered(of, 1.0) for name, of in given.items()}
        if held_out.all_texts and "text" not in self.denied:
            scores[f"{headline}_{FIRST_TEXT}"] = held_out.predicted[headline]
        scores |= held_out.fitted(label, self.denied)
        return tell(label, label, scores, held_out, headline, temperature=self._temperature(held_out))

    def _temperature(self, held_out: HeldOut) -> Temperature | None:
        """Of the headline; None without a validation study that carries the label."""
        validation = held_out.validation()
        if validation is None:
            return None
        given, label = validation.all_texts or validation.predicted, validation.labels[self.config.label]
        held = label >= 0
        claimed = given[held_out.task][view_name(self.denied)][held]
        return Temperature(fitted_temperature(claimed, label[held]), int(held.sum())) if held.any() else None
