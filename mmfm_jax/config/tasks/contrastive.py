"""`kind: contrastive`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mmfm_jax.config.base import Config, Count, PositiveFloat, PositiveInt
from mmfm_jax.config.tasks.base import Needs, TaskConfig

Modality = Literal["image", "text", "table"]
LARGEST_SCALE = 100.0  # after each update, as in CLIP, so that what reached it can come down again


class ZeroShot(Config):
    """A label read off image-text similarity: mean over positive minus mean over negative prompts."""

    label: str
    """Of the store, with two classes."""
    positive: Annotated[tuple[str, ...], Field(min_length=1)]
    """Sentences that are true where the label is."""
    negative: Annotated[tuple[str, ...], Field(min_length=1)]
    """Sentences that are true where it is not."""
    contexts: Count = 100
    """Training texts in which the prompts stand, at most: of those that hold one of the prompts, with every other in
    its place. A prompt alone is shorter than any text that was trained on. Where none holds one, all stand alone."""


class ContrastiveConfig(TaskConfig):
    """Two modalities of one study are drawn together, those of different studies apart.

    Negatives are the other studies of the part of the batch that is computed at once: with `train.accumulate` above 1,
    of one part. That is the one objective that accumulation changes.
    """

    of_evaluation: ClassVar[tuple[str, ...]] = ("zero_shot",)

    kind: Literal["contrastive"] = "contrastive"
    """Which task it is."""
    between: tuple[Modality, Modality] = ("image", "text")
    """The two modalities that are compared."""
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    """Each pair judged by itself (SigLIP), or each study's partner chosen among the batch (CLIP)."""
    width: PositiveInt = 128
    """Of the space in which the two meet."""
    initial_scale: Annotated[PositiveFloat, Field(le=LARGEST_SCALE)] = 10.0
    """Of the similarities: the inverse of the softmax's temperature."""
    initial_bias: float = -10.0
    """Sigmoid only: start near -log(studies a step), where every pair is as likely a match as it truly is."""
    mask_duplicates: bool = False
    """Pairs of different studies whose texts are identical, whole or in what is shown of them, are not counted as
    negatives."""
    zero_shot: dict[str, ZeroShot] = Field(default_factory=dict)
    """Questions that evaluation answers by prompts, between image and text; training does not read them."""

    @model_validator(mode="after")
    def _two(self):
        if self.between[0] == self.between[1]:
            raise ValueError(f"between names {self.between[0]} twice; name two modalities")
        if self.zero_shot and set(self.between) != {"image", "text"}:
            raise ValueError("zero_shot compares images with prompts; set between: [image, text]")
        return self

    @property
    def aligns_text(self) -> bool:
        return "text" in self.between and "image" in self.between

    def needs(self) -> Needs:
        return Needs(modalities={"between": self.between})
