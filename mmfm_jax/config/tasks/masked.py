"""`kind: masked`."""

from __future__ import annotations

import math
from typing import Literal

from mmfm_jax.config.base import Config, NotNegative, PositiveInt, Probability
from mmfm_jax.config.hiding import buffers
from mmfm_jax.config.inputs import Inputs
from mmfm_jax.config.tasks.base import TaskConfig


class PartWeights(Config):
    """Factors of the parts of the loss: of each image role, each text field, the numbers and the categories."""

    image: NotNegative = 1.0
    """Of each image role."""
    text: NotNegative = 1.0
    """Of each text field."""
    numbers: NotNegative = 1.0
    """Of the table's numbers together."""
    categories: NotNegative = 1.0
    """Of its categories together."""


class MaskedConfig(TaskConfig):
    """Hides a share of each modality and predicts it from what is left of all. Of several texts of a study that stand
    side by side, it is shown the first drawn alone: the others would tell what is hidden of that."""

    kind: Literal["masked"] = "masked"
    """Which task it is."""
    image: Probability = 0.6
    """Share of the patches that is hidden."""
    text: Probability = 0.3
    """Share of a text's tokens."""
    table: Probability = 0.3
    """Share of the columns."""
    depth: PositiveInt = 2
    """Blocks of the decoder, which has neither dropout nor stochastic depth nor LayerScale."""
    normalise: bool = True
    """Voxels of a hidden patch are predicted less their mean and over their deviation, as in MAE; else as windowed."""
    weights: PartWeights = PartWeights()
    """Of the parts of the loss."""

    def sequence_lengths(self, inputs: Inputs, registers: int) -> dict[str, tuple[int, ...]]:
        """What is shown of each image role."""
        shown = []
        for image in inputs.images.values() if self.image else ():
            patches = math.prod(size // patch for size, patch in zip(image.size, image.patch))
            tokens, studies = (image.pack.tokens, image.pack.studies) if image.pack else (patches, None)
            shown.append(buffers(tokens, studies, self.image, patches)[0] + (studies or 1) * registers)
        return {"image": tuple(shown)}
