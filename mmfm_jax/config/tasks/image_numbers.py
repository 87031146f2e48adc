"""`kind: image_numbers`."""

from __future__ import annotations

from typing import Literal

from mmfm_jax.config.tasks.base import Needs, TaskConfig


class ImageNumbersConfig(TaskConfig):
    """Size, extents, surface, shape and intensities of every image that is not packed, by `losses/image_numbers.py`."""

    kind: Literal["image_numbers"] = "image_numbers"
    """Which task it is."""

    def needs(self) -> Needs:
        return Needs(modalities={"kind": ("image",)})
