"""`model`: sizes of the encoders and of their fusion."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from mmfm_jax.config.base import Config, Count, Order, PositiveFloat, PositiveInt, Probability


class TransformerConfig(Config):
    """Size of one stack of pre-norm transformer blocks."""

    width: PositiveInt
    """Features of a token; `heads` divides it."""
    depth: PositiveInt
    """Blocks, one after the other."""
    heads: PositiveInt
    """Of attention; each has an even share of the width."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of the MLP over `width`."""
    gated: bool = False
    """Gated (GEGLU, arXiv:2002.05202) instead of plain GELU MLP."""
    dropout: Probability = 0.0
    """Training only: chance of each feature of what attention and MLP give to be zero (JMLR 15:1929)."""
    drop_path: Probability = 0.0
    """Training only: chance that a study passes by a branch of the last block; it rises linearly from 0 in the first,
    as in timm (stochastic depth, arXiv:1603.09382)."""
    layer_scale: PositiveFloat | None = None
    """Where a learnt factor for each feature of every branch starts (LayerScale, arXiv:2103.17239); none by default."""
    remat: Literal["none", "dots", "hidden", "attention", "full", "offload"] = "none"
    """What backward recomputes: nothing, all but the outputs of matmuls and attention, all but those of attention and
    the hidden layers of MLPs, all but those of attention, or whole blocks; `offload` is `full` with what enters each
    block kept in the host's memory."""
    precision: Literal["dtype", "int8", "fp8"] = "dtype"
    """Of the linear layers' products: that of the activations, or eight bits with a scale for each token and column
    (needs `pip install 'mmfm_jax[quantised]'`)."""
    attention: Literal["auto", "xla", "blocks", "cudnn", "splash"] = "auto"
    """How attention is computed: `auto` chooses by platform and shape; model/attention.py says what each is."""
    unroll: PositiveInt = 1
    """Blocks a turn of the loop over depth: more compile longer and spare the copies of what backward keeps."""

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}")
        if (self.width // self.heads) % 2:
            raise ValueError(
                f"width {self.width} over heads {self.heads} is odd; rotary positions need an even head width"
            )
        return self


class VisionConfig(TransformerConfig):
    """The encoder of images."""

    registers: Count = 4
    """Learned tokens beside the patches that hold global information (arXiv:2309.16588)."""
    wavelengths_mm: Annotated[tuple[PositiveFloat, PositiveFloat], Order("shortest and longest")] = (4.0, 2000.0)
    """Shortest and longest wavelength of the rotary positions: from about a patch to wider than any image."""


class TableConfig(TransformerConfig):
    """The encoder of the columns."""

    frequencies: PositiveInt = 16
    """Sine and cosine features of each number (arXiv:2203.05556)."""


class FusionConfig(TransformerConfig):
    """The fusion of images, texts and columns."""

    latents: PositiveInt = 16
    """Learned queries that cross-attend to every token present (Perceiver, arXiv:2103.03206)."""
    drop: Probability = 0.0
    """Training only: chance that a present modality is hidden from the fusion, so it works without any one of them."""


class ModelConfig(Config):
    """The encoders and their fusion. Widths may differ; tokens are projected to the width of the fusion."""

    vision: VisionConfig
    """Encoder of images."""
    text: TransformerConfig
    """Encoder of texts."""
    table: TableConfig
    """Encoder of the columns."""
    fusion: FusionConfig
    """What fuses the tokens of all three."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations and matmuls; parameters are float32."""
