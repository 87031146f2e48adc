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


class Packing(Config):
    """Images of several studies side by side in one row of tokens (NaViT, arXiv:2307.06304), each as large as it is."""

    studies: PositiveInt
    """Studies that share a row, the same number for every packed role; divides the batch of a device."""
    tokens: PositiveInt
    """Patches of a row; where its studies have more, the largest lose patches at their borders."""
    trim: bool = False
    """Leaves out border patches that hold nothing above the low end of `window`, such as air around a body."""

    @model_validator(mode="after")
    def _one_each(self):
        if self.tokens < self.studies:
            raise ValueError(
                f"{self.tokens} tokens leave no patch for some of {self.studies} studies; give more tokens"
            )
        return self


class Foreground(Config):
    """A share of the random crops centred on a voxel of the foreground, as nnU-Net does."""

    share: Fraction = 0.33
    """Of the training crops; the others are anywhere in the volume."""
    mask: str | None = None
    """Mask of the role whose classes are the foreground: of those that a study holds one is drawn, then a voxel of it.
    Without a mask, foreground is what is brighter than `above`."""
    above: float | None = None
    """Raw value; by default the one that parts the training images of the store best in two (Otsu's)."""

    @model_validator(mode="after")
    def _one_kind(self):
        if self.mask is not None and self.above is not None:
            raise ValueError("`mask` and `above` are two ways to say what foreground is; leave one of them out")
        return self


class ImageInput(Config):
    """How one image role enters the model."""

    size: Extent
    """Voxels of the crop, z y x; a 2D image is one slice (1, y, x). The largest crop where images are packed."""
    patch: Extent
    """Voxels of one token, z y x; divides `size`."""
    window: tuple[float, float]
    """Raw values (HU, grey levels) that map to 0 and 1; values outside are clipped."""
    crop: Literal["centre", "random"] = "centre"
    """Where training crops of volumes larger than `size` are taken; evaluation always takes the centre."""
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Spacing of the voxels of `size`, z y x: crops of a store of native spacings are read as large as they need be and
    resampled on the device. Without it a crop is `size` voxels as the store holds them."""
    foreground: Foreground | None = None
    """Centres a share of the random crops on the foreground or on classes of a mask."""
    pack: Packing | None = None
    """Gives each image only the tokens that it fills, and lets several studies share a row of them."""

    @model_validator(mode="after")
    def _divides(self):
        if any(s % p for s, p in zip(self.size, self.patch)):
            raise ValueError(
                f"patch {list(self.patch)} does not divide size {list(self.size)}; make each size a multiple"
            )
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window {list(self.window)} is empty; give [low, high] with low < high")
        if self.spacing_mm and self.pack:
            raise ValueError(
                "spacing_mm resamples voxels across patches, which packed images cannot do; drop one of them"
            )
        if self.foreground and self.crop != "random":
            raise ValueError("foreground is of random crops; set crop: random")
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
        packed = {image.pack.studies for image in self.images.values() if image.pack}
        if len(packed) > 1:
            counts = " and ".join(map(str, sorted(packed)))
            raise ValueError(f"images are packed {counts} studies a row; give every packed role the same pack.studies")
        return self

    @property
    def studies_a_row(self) -> int:
        """Consecutive studies of a batch that cannot be parted, because their images share a row."""
        return max((image.pack.studies for image in self.images.values() if image.pack), default=1)


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


class ImageOptions(Config):
    """What is otherwise for the images of one store of a mix; what is not given is as in `inputs.images`."""

    window: tuple[float, float] | None = None
    crop: Literal["centre", "random"] | None = None
    foreground: Foreground | None = None

    @model_validator(mode="after")
    def _window_is_one(self):
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError(f"window {list(self.window)} is empty; give [low, high] with low < high")
        return self


def changed_image(image: ImageInput, options: ImageOptions | None) -> ImageInput:
    """How an image enters the model from a store with options of its own."""
    given = {name: value for name in ImageOptions.model_fields if (value := getattr(options, name, None)) is not None}
    return image.model_copy(update=given)


class MixedStore(Config):
    """One of several stores that training draws from."""

    store: str
    """A StudyStore: a folder or a TensorStore URL."""
    weight: PositiveFloat = 1.0
    """Studies drawn from it, relative to the other stores; every stretch of the order keeps the proportion."""
    augment: Augment | None = None
    """In place of `data.augment`."""
    images: dict[str, ImageOptions] = {}
    """By role."""


class DataConfig(Config):
    """Where studies come from and how they are read."""

    store: str = ""
    """A StudyStore: a folder, or a TensorStore URL (file:// gs:// s3:// memory://)."""
    mix: dict[str, MixedStore] = {}
    """Several stores by a name of yours, in place of `store`. A part that one of them lacks is missing there."""
    vocabulary_size: PositiveInt = 4096
    """Entries of the tokenizer trained on the store's training texts."""
    train_share: Fraction = 1.0
    """Share of the training patients, by a hash of each, so that a smaller share is part of a larger: the model, the
    tokenizer and an evaluation's probes learn from it. Means and deviations of columns stay those of all of them."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json to use instead of training one."""
    augment: Augment = Augment()
    reader_threads: PositiveInt = 8
    """Threads that read and crop studies ahead of the step; they change the speed, never the batches."""
    prefetch_batches: PositiveInt = 4
    """Batches held ready on the host."""
    cache_bytes: Count = 128 * 2**20
    """Memory for chunks and shard indices that a process keeps, of all its stores together. Crops at random places of
    many volumes seldom meet a chunk again, so more of it helps where the volumes are few."""

    @model_validator(mode="after")
    def _store_or_mix(self):
        if bool(self.store) == bool(self.mix):
            raise ValueError("give either `store` or, for several stores, `mix`")
        return self

    @property
    def augments(self) -> tuple[Augment, ...]:
        """Of each store, in the order of names; one where there is one store."""
        return tuple(self.mix[name].augment or self.augment for name in sorted(self.mix)) or (self.augment,)


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
    """Of activations and matmuls; parameters are float32."""


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
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled, on matrices only."""
    b1: Probability = 0.9
    b2: Probability = 0.95
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the first moment; the second is float32."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters that are frozen or have a learning rate of their own; each belongs to the first group that fits."""
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
    stall_minutes: PositiveFloat = 10.0
    """Minutes without a step that ends, after which each process says so and writes its Python stacks to the run."""


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
        for name, mixed in self.data.mix.items():
            for role in mixed.images:
                if role not in self.inputs.images:
                    raise ValueError(
                        f"data.mix.{name}.images: {role} is not among inputs.images ({', '.join(self.inputs.images)})"
                    )
                changed = changed_image(self.inputs.images[role], mixed.images[role])
                if changed.foreground and changed.crop != "random":
                    raise ValueError(f"data.mix.{name}.images.{role}: foreground is of random crops; set crop: random")
        packed = [role for role, image in self.inputs.images.items() if image.pack]
        if packed and any(augment.shift_mm or augment.rotate_degrees for augment in self.data.augments):
            raise ValueError(
                f"data.augment: shift_mm and rotate_degrees resample voxels across patches, which packed images "
                f"(inputs.images.{packed[0]}.pack) cannot do; set both to 0 (crop: random moves the crop instead)"
            )
        return self


@functools.cache
def experiment_type() -> type[Experiment]:
    """`Experiment` with `tasks` narrowed to the union of every task's Config (imports the tasks, hence jax)."""
    from mmfm_jax.tasks import task_types

    configs: Any = functools.reduce(operator.or_, (task.Config for task in task_types().values()))
    tasks: Any = dict[str, Annotated[configs, Field(discriminator="kind")]]
    return create_model("Experiment", __base__=Experiment, __doc__=Experiment.__doc__, tasks=(tasks, ...))


def read_yaml(path: str | Path, wanted: str) -> Any:
    """What a YAML file holds. `wanted` says what to give instead. Raises UserError when it cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; give the path of {wanted}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; give the path of {wanted}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a YAML experiment and applies dotted overrides (`["--train.steps", "500"]`).

    Raises UserError with one sentence that names the file, the field and what is wrong.
    """
    import tyro

    raw = read_yaml(path, "an experiment in YAML, such as configs/demo.yaml")
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


def describe(error: ValidationError, source: str, help: str = "mmfm train CONFIG --help") -> str:
    """One sentence for the first thing wrong, and how many more there are; `help` lists all keys."""
    first, *rest = error.errors()
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"is not a known key; check its spelling against `{help}`"
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{source}: {field + ': ' if field else ''}{message}{more}"


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML that `load_experiment` reads back to an equal value."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, width=120)
