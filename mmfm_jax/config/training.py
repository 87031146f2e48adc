"""`mesh`, `optimizer`, `train` and `checkpoint`: how a run learns and what it keeps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmfm_jax.config.base import Config, Count, Fraction, NotNegative, PositiveFloat, PositiveInt, Probability


class MeshConfig(Config):
    """Devices along each axis; one axis may be -1 for all that remain."""

    data: int = 1
    """Copies of the parameters; crosses the slow links between slices or machines."""
    fsdp: int = -1
    """Shards of the parameters; the batch is split over data x fsdp."""
    sequence: int = 1
    """Shards of the tokens of a sequence."""
    tensor: int = 1
    """Shards of heads and hidden widths."""

    @model_validator(mode="after")
    def _sizes(self):
        sizes = [self.data, self.fsdp, self.sequence, self.tensor]
        if any(s < 1 and s != -1 for s in sizes) or sizes.count(-1) > 1:
            raise ValueError("sizes are positive, and at most one is -1 (all remaining devices)")
        return self


class ParameterGroup(Config):
    """Parameters that learn in a way of their own."""

    match: str
    """Pattern of dotted names, such as `model.vision.*`; `*` stands for any text."""
    learning_rate_scale: PositiveFloat = 1.0
    """Of the optimizer's learning rate, and with it of the weight decay."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a block over that of the next (BEiT, arXiv:2106.08254); embeddings are before the first."""
    frozen: bool = False
    """Stays as it starts: no gradient, no optimizer state, no weight decay."""

    @model_validator(mode="after")
    def _frozen_has_no_rate(self):
        if self.frozen and (self.learning_rate_scale, self.layer_decay) != (1.0, 1.0):
            raise ValueError(f"group {self.match} is frozen and has a learning rate; drop one of the two")
        return self


class OptimizerConfig(Config):
    """AdamW or Muon with warm-up."""

    kind: Literal["adamw", "muon"] = "adamw"
    """Muon is for the matrices of transformer blocks, at AdamW's learning rates; all other parameters have AdamW."""
    learning_rate: PositiveFloat = 1e-3
    """At its peak, after warm-up."""
    weight_decay: NotNegative = 0.05
    """Decoupled, on matrices only: not on embeddings, learned tokens, positions, biases and scales."""
    b1: Probability = 0.9
    """Decay of the gradient's moving mean."""
    b2: Probability = 0.95
    """Decay of the moving mean of its square."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the first moment; the second is float32."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters that are frozen or have a learning rate of their own; each belongs to the first group that fits."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After warm-up: cosine to `final_fraction`, or constant then a linear decay (warmup-stable-decay)."""
    warmup_steps: Count = 100
    """Steps in which the learning rate rises from 0."""
    decay_fraction: Fraction = 0.2
    """Share of the steps that the wsd decay takes."""
    final_fraction: Fraction = 0.01
    """Final over peak learning rate."""
    clip_norm: PositiveFloat = 1.0
    """Largest global norm of the gradient."""


class ProfileConfig(Config):
    """A trace of some steps for XProf or Perfetto, written to `profile/` in the run's folder by `jax.profiler`."""

    start: PositiveInt
    """First step that is traced; a run that goes on after it traces none."""
    steps: PositiveInt = 3
    """How many are traced."""


class TrainConfig(Config):
    """How long a run is, how a step is taken and what it tells."""

    steps: PositiveInt
    """Of the whole run; a run that goes on counts those that it took."""
    batch_size: PositiveInt
    """Studies a step, over all devices."""
    accumulate: PositiveInt = 1
    """Parts a batch is computed in, one after another, to save memory; contrastive tasks see one part at a time."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the gradients of linear layers when devices sum them, where `model.dtype` is bfloat16: bfloat16 halves what is
    sent and rounds each device's share to 8 bits."""
    ema_decay: Probability | None = None
    """Keeps an exponential moving average of the parameters, which evaluation then uses."""
    max_skipped: PositiveInt = 20
    """Steps in a row with a non-finite gradient (each is skipped and counted) after which the run stops."""
    log_every: PositiveInt = 10
    """Steps between lines of `metrics.jsonl`."""
    validate_every: PositiveInt = 200
    """Steps between validations on the store's validation patients."""
    validate_batches: PositiveInt = 4
    """Batches of a validation."""
    patience: PositiveInt | None = None
    """Validations in a row without a better `checkpoint.best` after which the run stops (`null`: none does)."""
    stall_minutes: PositiveFloat = 10.0
    """Minutes without a step that ends, after which each process says so and writes its Python stacks to the run."""
    profile: ProfileConfig | None = None
    """Steps to trace, if any."""


HIGHER, LOWER = (
    {"accuracy", "auc", "auprc", "auroc", "bleu", "dice", "f1", "iou", "precision", "psnr", "recall", "ssim"},
    {"error", "loss", "mae", "mse", "nll", "perplexity", "rmse"},
)
"""Words of a metric's last name that say which way is better."""


class CheckpointConfig(Config):
    """What a run keeps to go on from and to evaluate."""

    every: PositiveInt = 200
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Latest checkpoints kept, besides the best."""
    best: str | None = "validation/loss"
    """Validation metric whose best checkpoint is kept too (`null`: none)."""
    best_mode: Literal["auto", "min", "max"] = "auto"
    """Whether the lowest or the highest is best; auto knows losses, accuracies and the like by their names."""

    @property
    def higher_is_better(self) -> bool:
        return self.best_mode == "max" or (self.best_mode == "auto" and bool(self._words() & HIGHER))

    def _words(self) -> set[str]:
        return set((self.best or "").rpartition("/")[2].split("_"))

    @model_validator(mode="after")
    def _direction_is_known(self):
        known = bool(self._words() & HIGHER) != bool(self._words() & LOWER)
        if self.best and self.best_mode == "auto" and not known:
            raise ValueError(f"whether a high or a low {self.best} is better is not known; set best_mode to min or max")
        return self
