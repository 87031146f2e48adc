"""`kind: caption`."""

from __future__ import annotations

from typing import Literal

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.config.tasks.base import Needs, TaskConfig


class CaptionConfig(TaskConfig):
    """Cross-entropy of each next token of one text field, no text being shown to the fusion. Of several texts of a
    study that stand side by side, the first drawn is predicted."""

    kind: Literal["caption"] = "caption"
    """Which task it is."""
    field: str
    """Text of the inputs that is predicted."""
    decoder: TransformerConfig
    """Causal, with cross-attention to the latents in every block."""
    tied: bool = False
    """A token is predicted by the vector that also embeds it."""

    @property
    def aligns_text(self) -> bool:
        return True

    def needs(self) -> Needs:
        return Needs(texts={"field": self.field})

    def stacks(self) -> dict[str, TransformerConfig]:
        return {"decoder": self.decoder}
