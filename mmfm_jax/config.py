"""The whole experiment as frozen, typed data: YAML in, dotted overrides on top, one JSON schema for editors.

Every class is a pydantic model that refuses unknown keys. What a task can be configured with lives in the task's own
file (`tasks/`); `experiment_type` joins those to the rest, so a new task needs no edit here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)

from mmfm_jax.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
Extent = tuple[PositiveInt, PositiveInt, PositiveInt]


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, docstrings become help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


# ---------------------------------------------------------------- inputs: the contract between the data and the model


class ImageInput(Config):
    """How one image role enters the model."""

    size: Extent
    """Voxels of the crop, z y x; a 2D image is one slice (1, y, x)."""
    patch: Extent
    """Voxels of one token, z y x; divides `size`."""
    window: tuple[float, float]
    """Raw values (HU, grey levels) that map to 0 and 1; values outside are clipped."""
    crop: Literal["centre", "random"] = "centre"
    """Where training crops of volumes larger than `size` are taken; evaluation always takes the centre."""

    @model_validator(mode="after")
    def _divides(self):
        if any(s % p for s, p in zip(self.size, self.patch)):
            raise ValueError(
                f"patch {list(self.patch)} does not divide size {list(self.size)}; make each size a multiple"
            )
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window {list(self.window)} is empty; give [low, high] with low < high")
        return self


class TextInput(Config):
    """How one text field enters the model."""

    length: PositiveInt
    """Tokens kept of a text; shorter ones are padded."""
    sentence_keep: Fraction = 1.0
    """Training only: chance that a sentence of the text is shown, in random order (ConVIRT, arXiv:2010.00747);
    1 shows the text as it stands."""


class Inputs(Config):
    """Which parts of a study the model sees."""

    images: dict[str, ImageInput] = {}
    """Image roles by their name in the store."""
    texts: dict[str, TextInput] = {}
    """Text fields by their name in the store."""
    columns: tuple[str, ...] = ()
    """Table columns by their name in the store."""

    @model_validator(mode="after")
    def _some(self):
        if not (self.images or self.texts or self.columns):
            raise ValueError("no image, text or column is named; name at least one")
        return self


# ---------------------------------------------------------------- data


class Augment(Config):
    """Random changes to training images, made on the device inside the jitted step."""

    flip: Probability = 0.5
    """Chance of a mirror image along each axis."""
    shift_mm: Annotated[float, Field(ge=0)] = 0.0
    """Largest shift along each axis, in millimetres."""
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation about each axis."""
    intensity: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of contrast, and largest shift of brightness, of the windowed image."""


class DataConfig(Config):
    """Where studies come from and how they are read."""

    store: str
    """A StudyStore: a folder, or a TensorStore URL (file:// gs:// s3:// memory://)."""
    vocabulary_size: PositiveInt = 4096
    """Entries of the tokenizer trained on the store's training texts."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json to use instead of training one."""
    augment: Augment = Augment()
    reader_threads: PositiveInt = 8
    """Threads that read and crop studies ahead of the step; they change the speed, never the batches."""
    prefetch_batches: PositiveInt = 4
    """Batches held ready on the host."""


# ---------------------------------------------------------------- model


class TransformerConfig(Config):
    """Size of one stack of pre-norm transformer blocks."""

    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of the MLP over `width`."""
    gated: bool = False
    """Gated (GEGLU, arXiv:2002.05202) instead of plain GELU MLP."""
    remat: Literal["none", "dots", "full"] = "none"
    """What backward recomputes: nothing, all but matmul outputs, or whole blocks."""
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
    registers: Count = 4
    """Learned tokens beside the patches that hold global information (arXiv:2309.16588)."""
    wavelengths_mm: tuple[PositiveFloat, PositiveFloat] = (4.0, 2000.0)
    """Shortest and longest wavelength of the rotary positions: from about a patch to wider than any image."""


class TableConfig(TransformerConfig):
    frequencies: PositiveInt = 16
    """Sine and cosine features of each number (arXiv:2203.05556)."""


class FusionConfig(TransformerConfig):
    latents: PositiveInt = 16
    """Learned queries that cross-attend to every token present (Perceiver, arXiv:2103.03206)."""
    drop: Probability = 0.0
    """Training only: chance that a present modality is hidden from the fusion, so it works without any one of them."""


class ModelConfig(Config):
    """The encoders and their fusion. Widths may differ; tokens are projected to the width of the fusion."""

    vision: VisionConfig
    text: TransformerConfig
    table: TableConfig
    fusion: FusionConfig
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations and matmuls; parameters and optimizer state are float32."""


# ---------------------------------------------------------------- tasks


class TaskConfig(Config):
    """What every task has; each file in `tasks/` extends it with a `kind` of its own."""

    kind: str
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this task's loss in the sum."""


# ---------------------------------------------------------------- training


class MeshConfig(Config):
    """Devices along each axis; one axis may be -1 for all that remain."""

    data: int = 1
    """Copies of the parameters; crosses the slow links between slices or machines."""
    fsdp: int = -1
    """Shards of the parameters; the batch is split over data x fsdp."""
    sequence: int = 1
    tensor: int = 1
    """Shards of heads and hidden widths."""

    @model_validator(mode="after")
    def _sizes(self):
        sizes = [self.data, self.fsdp, self.sequence, self.tensor]
        if any(s < 1 and s != -1 for s in sizes) or sizes.count(-1) > 1:
            raise ValueError("sizes are positive, and at most one is -1 (all remaining devices)")
        return self


class OptimizerConfig(Config):
    """AdamW with warm-up."""

    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled, on matrices only."""
    b1: Probability = 0.9
    b2: Probability = 0.95
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After warm-up: cosine to `final_fraction`, or constant then a linear decay (warmup-stable-decay)."""
    warmup_steps: Count = 100
    decay_fraction: Fraction = 0.2
    """Share of the steps that the wsd decay takes."""
    final_fraction: Fraction = 0.01
    """Final over peak learning rate."""
    clip_norm: PositiveFloat = 1.0
    """Largest global norm of the gradient."""


class TrainConfig(Config):
    steps: PositiveInt
    batch_size: PositiveInt
    """Studies a step, over all devices."""
    accumulate: PositiveInt = 1
    """Parts a batch is computed in, one after another, to save memory; contrastive tasks see one part at a time."""
    ema_decay: Probability | None = None
    """Keeps an exponential moving average of the parameters, which evaluation then uses."""
    max_skipped: PositiveInt = 20
    """Steps in a row with a non-finite gradient (each is skipped and counted) after which the run stops."""
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 200
    """Steps between validations on the store's validation patients."""
    validate_batches: PositiveInt = 4


class CheckpointConfig(Config):
    every: PositiveInt = 200
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Latest checkpoints kept, besides the best."""
    best: str | None = "validation/loss"
    """Validation metric whose lowest checkpoint is kept too (`null`: none)."""


class ZeroShot(Config):
    """A label read off image-text similarity: mean over positive minus mean over negative prompts."""

    label: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    task: str = "image_text"
    """The contrastive task whose embeddings are compared."""


class EvaluateConfig(Config):
    """What `mmfm evaluate` measures on held-out patients."""

    split: str = "test"
    batch_size: PositiveInt = 128
    bootstrap: PositiveInt = 1000
    """Patient-level resamples behind each 95% interval."""
    zero_shot: dict[str, ZeroShot] = {}
    baselines: dict[str, tuple[str, ...]] = {}
    """Logistic regressions on these columns, by name; `table` (boosting on `inputs.columns`) is always there."""
    recall_at: tuple[PositiveInt, ...] = (1, 5, 10)


class Experiment(Config):
    """Everything a run depends on; saved, resolved, with the run."""

    name: str
    seed: Count = 0
    """Of initialisation, shuffling, augmentation and masking."""
    inputs: Inputs
    data: DataConfig
    model: ModelConfig
    tasks: dict[str, TaskConfig]
    """Proxy tasks by a name of yours; the run minimises their weighted sum."""
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _fits_together(self):
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one")
        if self.train.batch_size % self.train.accumulate:
            raise ValueError(
                f"train.accumulate {self.train.accumulate} does not divide train.batch_size {self.train.batch_size}"
            )
        return self


@functools.cache
def experiment_type() -> type[Experiment]:
    """`Experiment` with `tasks` narrowed to the union of every task's Config (imports the tasks, hence jax)."""
    from mmfm_jax.tasks import task_types

    configs: Any = functools.reduce(operator.or_, (task.Config for task in task_types().values()))
    tasks: Any = dict[str, Annotated[configs, Field(discriminator="kind")]]
    return create_model("Experiment", __base__=Experiment, __doc__=Experiment.__doc__, tasks=(tasks, ...))


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a YAML experiment and applies dotted overrides (`["--train.steps", "500"]`).

    Raises UserError with one sentence that names the file, the field and what is wrong.
    """
    import tyro

    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: there is no such file; give the path of an experiment in YAML, such as configs/demo.yaml"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    experiment = validate(raw, str(path))
    if not overrides:
        return experiment
    try:
        return tyro.cli(experiment_type(), default=experiment, args=list(overrides), prog=f"mmfm train {path}")
    except ValidationError as error:
        raise UserError(describe(error, "the command line")) from error


def validate(raw: Any, source: str) -> Experiment:
    """The experiment in parsed YAML; `source` is named in errors."""
    if not isinstance(raw, dict):
        raise UserError(
            f"{source}: holds no experiment; it must be a mapping with inputs, data, model, tasks and train"
        )
    try:
        return experiment_type().model_validate(raw)
    except ValidationError as error:
        raise UserError(describe(error, source)) from error


def describe(error: ValidationError, source: str) -> str:
    """One sentence for the first thing wrong, and how many more there are."""
    first, *rest = error.errors()
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "is not a known key; check its spelling against `mmfm train CONFIG --help`"
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{source}: {field + ': ' if field else ''}{message}{more}"


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML that `load_experiment` reads back to an equal value."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, width=120)
